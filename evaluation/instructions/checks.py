"""Whether an answer follows an instruction, for the kinds of instructions of IFEval (arXiv 2311.07911), by their names.

Written from the paper's list of instructions and the arguments in its published rows. Sentences are counted by their
last signs, where the authors take a trained splitter. The language of an answer is not checked, which needs a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_WORD = re.compile(r"[\w'-]+")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")
_FENCE = re.compile(r"^```(?:json)?\s*|\s*```$", re.IGNORECASE)
_OPTIONS = ("my answer is yes.", "my answer is no.", "my answer is maybe.")


def _related(count: int, relation: str, wanted: int) -> bool:
    """relation: `less than` or `at least`."""
    return count < wanted if relation == "less than" else count >= wanted


def _occurrences(word: str, text: str, *, whole: bool = False) -> int:
    edge = r"\b" if whole else ""
    return len(re.findall(f"{edge}{re.escape(word)}{edge}", text, re.IGNORECASE))


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _related(text.lower().count(letter.lower()), let_relation, let_frequency)


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    ended = list(_SENTENCE_END.finditer(text.strip()))
    rest = text.strip()[ended[-1].end() :] if ended else text.strip()
    return _related(len(ended) + bool(rest.strip()), relation, num_sentences)


def _marked_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    inner = parts[int(not parts[0]) : len(parts) - int(not parts[-1])]
    return len(inner) == num_paragraphs and all(inner)


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    found = _WORD.search(parts[nth_paragraph - 1])
    return found is not None and found[0].strip("'").lower() == first_word.lower()


def _postscript(text: str, postscript_marker: str) -> bool:
    loosely = r"\s?".join(re.escape(character) for character in postscript_marker.replace(" ", ""))
    return re.search(loosely, text, re.IGNORECASE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*(?!\*)|-).*\S", text, re.MULTILINE)) == num_bullets


def _highlights(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", text)
    return sum(bool("".join(part).strip()) for part in found) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:  # the published rows spell it so
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def _is_json(text: str) -> bool:
    try:
        json.loads(_FENCE.sub("", text.strip()))
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******") if part.strip()]
    return len(parts) == 2 and parts[0] != parts[1]


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _related(sum(word.isupper() for word in _WORD.findall(text)), capital_relation, capital_frequency)


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(_occurrences(word, text) for word in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation: _related(
        _occurrences(keyword, text), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(_occurrences(word, text, whole=True) for word in forbidden_words)
    ),
    "keywords:letter_frequency": _letters,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _marked_paragraphs,
    "length_constraints:number_words": lambda text, num_words, relation: _related(
        len(_WORD.findall(text)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\]\n]+\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text: any(option in text.lower() for option in _OPTIONS),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text: any(found.strip() for found in re.findall(r"<<([^\n]+?)>>", text)),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda text: "," not in text,
}
