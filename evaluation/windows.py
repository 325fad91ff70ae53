"""The examples that perplexity is measured on: windows of a text, or prompts and answers of a question set."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from texts.data_sets import read_hub, read_saved
from texts.files import has_known_ending, is_plain_text, read_documents, read_records
from texts.records import Record
from transformers_patches.errors import PartInferError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFILL_TOKENS, SCORED_TOKENS = 256, 128  # of a window
HALVES = ("all", "first", "second")
_QUESTION = "Question: {question}\nAnswer:"
_QUESTION_ABOUT = "Context: {context}\nQuestion: {question}\nAnswer:"
_ANSWER = " {answer}"
_INDEX = re.compile(r"\[([^\]]*)\]")  # of a Python format string


@dataclass(frozen=True)
class Example:
    """The token ids of one example. Neither part is empty."""

    context: list[int]  # prefilled, except for its last token
    target: list[int]  # scored


@dataclass(frozen=True)
class Source:
    """Where examples come from.

    Templates are Python format strings over a row's fields. Without them, rows with `question` and `answer` get a plain
    question prompt, and rows with `text` are joined into one text.
    """

    dataset: str  # a file, a folder that download.py saved, or a hub id: ID or ID:CONFIG
    split: str = "test"  # of a saved or hub data set
    half: str = "all"  # one of HALVES
    limit: int | None = None  # take at most this many examples, drawn at random but kept in order; None: all
    seed: int = 0  # of that draw
    prefill_tokens: int = PREFILL_TOKENS  # of a window
    scored_tokens: int = SCORED_TOKENS  # of a window
    prompt_template: str | None = None  # gives what is prefilled
    target_template: str | None = None  # gives what is scored

    def __post_init__(self) -> None:
        if self.half not in HALVES:
            raise PartInferError(f"half must be one of {', '.join(HALVES)}, got {self.half!r}")
        for name in ("prefill_tokens", "scored_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PartInferError(f"{name} must be at least 1, got {value}")
        if self.target_template is None and self.prompt_template is not None:
            raise PartInferError("prompt_template needs target_template: which fields are the answer?")


def read_examples(source: Source, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """The examples of a source. Raises PartInferError if it can't be read or has none.

    max_length: the model's; prompts that exceed it lose their beginning
    """
    content = _read(source)
    if isinstance(content, str):
        examples = _text_windows(content, source, tokenizer)
    else:
        examples = [_question(row, source, tokenizer, max_length) for row in content]
    examples = _half(examples, source.half)
    if not examples:
        raise PartInferError(
            f"{source.dataset} ({source.half}) gives no example: windows take "
            f"{source.prefill_tokens} + {source.scored_tokens} tokens"
        )
    if source.limit is not None and source.limit < len(examples):
        chosen = sorted(random.Random(source.seed).sample(range(len(examples)), source.limit))
        examples = [examples[i] for i in chosen]
    return examples


def _half(items: list, half: str) -> list:
    middle = len(items) // 2
    return {"all": items, "first": items[:middle], "second": items[middle:]}[half]


def _read(source: Source) -> str | list[Record]:
    """The text of a source, or its rows."""
    path = Path(source.dataset)
    if path.is_file() and is_plain_text(path):
        return "".join(record.text("text") for record in read_documents(path))
    rows = list(_records(source, path))
    if source.target_template is None and all("text" in row.fields for row in rows):
        return "\n".join(row.text("text") for row in rows)
    return rows


def _records(source: Source, path: Path) -> Iterator[Record]:
    if path.is_file():
        return read_records(path)
    if path.is_dir():
        return read_saved(path, source.split)
    name, _, config = source.dataset.partition(":")
    if name.startswith(("/", ".", "~")) or has_known_ending(path):
        raise PartInferError(f"no data set at {name}: expected a file of texts, a folder of download.py, or a hub id")
    return read_hub(name, config or None, source.split, streaming=False)


def _text_windows(text: str, source: Source, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Consecutive windows. Each begins with the token that the tokenizer puts before every text, if there is one."""
    tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    prefix = _prefix(tokenizer)
    own = source.prefill_tokens - len(prefix)
    if own < 0 or source.prefill_tokens < 1:
        raise PartInferError(f"prefill_tokens must be at least {max(1, len(prefix))}, got {source.prefill_tokens}")
    length = own + source.scored_tokens
    starts = range(0, len(tokens) - length + 1, length)
    return [Example(prefix + tokens[s : s + own], tokens[s + own : s + length]) for s in starts]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that begins every text of the model ([] if there is none)."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def _question(row: Record, source: Source, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    about = source.prompt_template is None and row.has("context") and row.text("context").strip()
    prompt = _filled(source.prompt_template or (_QUESTION_ABOUT if about else _QUESTION), row)
    answer = _filled(source.target_template or _ANSWER, row, of_text=True)
    target = tokenizer.encode(answer, add_special_tokens=False)
    if not target:
        raise PartInferError(f"{row.where}: the answer {answer!r} has no tokens")
    context = tokenizer.encode(prompt) or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    return Example(context[-(max_length + 1 - len(target)) :], target)


class _Filler(Formatter):
    """Format strings whose fields are texts of a record: {answer}, {answers[text][0]}, {translation.de}."""

    def __init__(self, row: Record) -> None:
        self.row, self.texts = row, []

    def get_field(self, field_name: str, args: Sequence, kwargs: Mapping) -> tuple[str, str]:
        text = self.row.text(_INDEX.sub(r".\1", field_name))
        self.texts.append(text)
        return text, field_name


def _filled(template: str, row: Record, *, of_text: bool = False) -> str:
    """A template with a row's texts. of_text: whether a row whose texts are all blank is an error."""
    filler = _Filler(row)
    try:
        text = filler.format(template)
    except PartInferError as error:
        raise PartInferError(f"{error} (fields are named by --prompt_template and --target_template)") from None
    except (ValueError, IndexError, KeyError) as error:
        raise PartInferError(f"{template!r} is no template: {error}; write such as 'Question: {{question}}'") from None
    if of_text and not any(text.strip() for text in filler.texts):
        raise PartInferError(f"{row.where}: the answer is empty: leave such rows out")
    return text
