"""Fields of records: what is a text, and what is said of everything else."""

from __future__ import annotations

import pytest

from texts.records import Record
from transformers_patches.errors import PartInferError

TRIVIAQA = {"value": "Paris", "aliases": ["City of Light"], "normalized_value": "paris"}
RECORD = Record(
    {
        "text": "as it is",
        "number": 42,
        "half": 0.5,
        "answer": TRIVIAQA,
        "answers": {"text": ["one", "two"], "start": [3]},
        "translation": {"de": "Ja"},
        "a.b": "dotted",
        "null": None,
        "nan": float("nan"),
        "true": True,
        "bytes": b"x",
        "list": [],
        "object": {},
        "surrogate": "\ud83d",
    },
    "rows.jsonl, line 7",
)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("text", "as it is"),
        ("number", "42"),
        ("half", "0.5"),
        ("answer", "Paris"),
        ("answer.aliases.0", "City of Light"),
        ("answers.text.1", "two"),
        ("answers.start.0", "3"),
        ("translation.de", "Ja"),
        ("a.b", "dotted"),
    ],
)
def test_texts_and_numbers_are_found(path, text):
    assert RECORD.text(path) == text
    assert RECORD.has(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("null", "field 'null' is null, expected a text"),
        ("nan", "field 'nan' is null"),
        ("true", "field 'true' is true, expected a text"),
        ("bytes", "field 'bytes' is of type bytes"),
        ("list", "field 'list' is a list of 0, expected a text"),
        ("answers.text", "is a list of 2, expected one text: name the place, such as {answers.text.0}"),
        ("answers", "is an object with text, start: name one of them, such as {answers.text}"),
        ("object", "is an object with nothing in it, expected a text"),
        ("surrogate", "has half of a character"),
        ("nothing", "there is no field 'nothing', only text, number, half"),
        ("answers.text.2", "there is no field 'answers.text.2'"),
        ("translation.en", "there is no field 'translation.en'"),
    ],
)
def test_everything_else_is_told_with_its_place_and_what_would_work(path, message):
    with pytest.raises(PartInferError, match=message) as raised:
        RECORD.text(path)
    assert str(raised.value).startswith("rows.jsonl, line 7: ")
    assert "\n" not in str(raised.value)


def test_null_is_nothing():
    assert [RECORD.has(path) for path in ("null", "nan", "nothing", "translation.en", "list")] == [False] * 4 + [True]
