"""Verifiable instructions (IFEval, arXiv 2311.07911): rows in the published format, and how answers are scored.

lm-eval imports this file by its path.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

import evaluation.instructions
from evaluation.instructions.checks import CHECKS
from transformers_patches.errors import PartInferError

BUILTIN = Path(evaluation.instructions.__file__).parent / "builtin.jsonl"


def builtin(**_metadata) -> DatasetDict:
    """The project's own rows."""
    return load_dataset("json", data_files={"test": str(BUILTIN)})


def checked(rows: Dataset) -> Dataset:
    """The rows; PartInferError for instructions that can't be checked, so that none is left out of a score silently."""
    for row in rows:
        for name, options in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            if name not in CHECKS:
                raise PartInferError(
                    f"the instruction {name} can't be checked here (row {row['key']}): leave such rows out of the file"
                )
            try:
                inspect.signature(CHECKS[name]).bind("", **_given(options))
            except TypeError as error:
                raise PartInferError(f"row {row['key']}, {name}: {error}") from None
    return rows


def scores(doc: dict, results: list[str]) -> dict[str, float | list[bool]]:
    """Whether all instructions of a prompt are followed, and which: by the answer (strict), or by it without its first or
    last line or its emphasis (loose).
    """
    answer = results[0]
    strict = [_follows(doc, number, answer) for number in range(len(doc["instruction_id_list"]))]
    loose = [
        any(_follows(doc, number, variant) for variant in _variants(answer))
        for number in range(len(doc["instruction_id_list"]))
    ]
    return {
        "prompt_level_strict_acc": float(all(strict)),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": float(all(loose)),
        "inst_level_loose_acc": loose,
    }


def of_all_instructions(items: list[list[bool]]) -> float:
    """The share of instructions that are followed, whatever prompt they belong to."""
    followed = [one for item in items for one in item]
    return sum(followed) / len(followed)


def _follows(doc: dict, number: int, answer: str) -> bool:
    check = CHECKS[doc["instruction_id_list"][number]]
    return bool(answer.strip()) and check(answer, **_given(doc["kwargs"][number]))


def _given(options: dict | None) -> dict:
    """The arguments of a row's instruction: columns of other instructions are None in it."""
    return {name: value for name, value in (options or {}).items() if value is not None}


def _variants(answer: str) -> Iterator[str]:
    lines = answer.split("\n")
    for first, last, emphasis in product((0, 1), (0, 1), (True, False)):
        text = "\n".join(lines[first : len(lines) - last]).strip() if first or last else answer
        yield text if emphasis else text.replace("*", "")
