"""GSM8K (arXiv 2110.14168): the number that an answer ends with.

lm-eval imports this file by its path, so it imports nothing of the project.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = r"-?\$?\s?-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def number_scores(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the number after the last `####` is right (exact_match), and whether the last number of all is (last_number)."""
    wanted = _value(_last(_MARKED, doc["answer"]))
    if wanted is None:
        raise ValueError(f"the answer of a row must have its number after ####, got {doc['answer'][-80:]!r}")
    answer = results[0]
    return {
        "exact_match": float(_value(_last(_MARKED, answer)) == wanted),
        "last_number": float(_value(_last(_ANY, answer)) == wanted),
    }


def _last(pattern: re.Pattern, text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1] if found else None


def _value(text: str | None) -> Decimal | None:
    """12, 12.0, $12 and 1,200 as numbers; None if there is none."""
    if text is None:
        return None
    try:
        return Decimal(re.sub(r"[$,\s]", "", text))
    except InvalidOperation:
        return None
