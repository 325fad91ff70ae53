"""The examples that perplexity is measured on: windows of a text, or prompts and answers of a question set."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers_patches.errors import PartInferError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFILL_TOKENS, SCORED_TOKENS = 256, 128  # of a window
HALVES = ("all", "first", "second")
_QUESTION = "Question: {question}\nAnswer:"
_QUESTION_ABOUT = "Context: {context}\nQuestion: {question}\nAnswer:"
_ANSWER = " {answer}"


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

    dataset: str  # a file, or a hub id: ID or ID:CONFIG
    split: str = "test"  # of a hub data set
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


def _read(source: Source) -> str | list[dict]:
    """The text of a source, or its rows."""
    path = Path(source.dataset)
    if path.is_file() and path.suffix not in (".jsonl", ".json"):
        return path.read_text(encoding="utf-8")
    rows = _read_rows(path) if path.is_file() else _read_hub(source)
    if source.target_template is None and all("text" in row for row in rows):
        return "\n".join(row["text"] for row in rows)
    return rows


def _read_rows(path: Path) -> list[dict]:
    try:
        # split at "\n" only: texts may contain the other separators of str.splitlines
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise PartInferError(f"{path} is not JSON lines: {error}") from None
    wrong = next((row for row in rows if not isinstance(row, dict)), None)
    if wrong is not None:
        raise PartInferError(f"{path}: expected one object per line, got {str(wrong)[:40]}")
    return rows


def _read_hub(source: Source) -> list[dict]:
    from datasets import load_dataset

    name, _, config = source.dataset.partition(":")
    if name.startswith(("/", ".")) or Path(name).suffix:
        raise PartInferError(f"no data set at {name}: expected a text or JSON lines file, or a hub id")
    try:
        return list(load_dataset(name, config or None, split=source.split))
    except Exception as error:  # the hub's clients raise whatever their transport raises
        raise PartInferError(f"{name} is neither a file nor a hub data set that can be read: {error}") from error


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


def _question(row: dict, source: Source, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    prompt_template = source.prompt_template or (_QUESTION_ABOUT if "context" in row else _QUESTION)
    try:
        prompt = prompt_template.format_map(row)
        answer = (source.target_template or _ANSWER).format_map(row)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PartInferError(
            f"{source.dataset}: a row with fields {', '.join(row)} does not fit the templates ({error!r}): "
            "give --prompt_template and --target_template"
        ) from None
    target = tokenizer.encode(answer, add_special_tokens=False)
    if not target:
        raise PartInferError(f"{source.dataset}: the answer {answer!r} has no tokens")
    context = tokenizer.encode(prompt) or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    return Example(context[-(max_length + 1 - len(target)) :], target)
