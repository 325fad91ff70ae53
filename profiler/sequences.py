"""Texts -> token sequences -> windows of length-bucketed batches, in an order that never changes."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice

from transformers import PreTrainedTokenizerBase

from profiler.templates import Prompt
from transformers_patches.errors import PartInferError


@dataclass(frozen=True)
class Sequence:
    """The token ids of a text; `number` is its place in the source, from 0."""

    number: int
    ids: list[int]


class Encoder:
    """Turns prompts into token ids of at most `max_length`.

    chat_template: wrap each prompt as a user's message of the model's chat template; split: cut long texts in pieces
    (language modelling) instead of keeping their beginning.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        chat_template: bool = False,
        split: bool = False,
    ) -> None:
        if chat_template and not tokenizer.chat_template:
            raise PartInferError("the tokenizer has no chat template: leave out --chat_template")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.chat_template, self.split = chat_template, split

    def sequences(self, prompts: Iterable[Prompt]) -> Iterator[list[int]]:
        for prompt in prompts:
            if self.split:
                yield from self._pieces(prompt)
            else:
                yield self._encode(prompt)

    def _encode(self, prompt: Prompt) -> list[int]:
        """A prompt's ids; of one that is too long the beginning and the template's end are kept."""
        text, suffix = prompt.text, prompt.suffix
        if self.chat_template:
            messages = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            suffix += text.rpartition(prompt.text.strip())[2]
        ids = self.tokenizer(text, add_special_tokens=not self.chat_template, truncation=False, verbose=False)[
            "input_ids"
        ]
        if len(ids) <= self.max_length:
            return ids
        end = self.tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
        if len(end) >= self.max_length:
            raise PartInferError(f"the template's end alone has {len(end)} tokens, --max_length is {self.max_length}")
        return ids[: self.max_length - len(end)] + end

    def _pieces(self, prompt: Prompt) -> Iterator[list[int]]:
        ids = self.tokenizer(prompt.text, add_special_tokens=False, verbose=False)["input_ids"]
        start = self.leading_ids()
        size = self.max_length - len(start)
        for first in range(0, len(ids), size):
            yield start + ids[first : first + size]

    def leading_ids(self) -> list[int]:
        """What the tokenizer puts before every text, such as a begin-of-text token."""
        with_special = self.tokenizer("a")["input_ids"]
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return with_special[: len(with_special) - len(plain)] if with_special[-len(plain) :] == plain else []


@dataclass(frozen=True)
class Window:
    """Consecutive sequences that are sorted into batches together; a checkpoint is written after each.

    digest: of all the sequences up to the window's end, to notice texts that changed.
    """

    index: int
    sequences: list[Sequence]
    digest: str

    def batches(self, batch_size: int) -> list[list[Sequence]]:
        """Batches of similar lengths, the longest first, so that one that does not fit in memory is met early."""
        by_length = sorted(self.sequences, key=lambda s: (-len(s.ids), s.number))
        return [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]


def windows(
    sequences: Iterable[list[int]],
    size: int,
    skip: int = 0,
    limit: int | None = None,
    *,
    done: int = 0,
    digest: str = "",
) -> Iterator[Window]:
    """Group sequences number `skip` to `skip + limit` by `size`. Memory holds one window.

    done, digest: for a source that begins where an earlier run ended: windows that run had done, and their digest.
    """
    stop = None if limit is None else skip + limit - done * size
    numbered = islice(enumerate((ids for ids in sequences if ids), start=done * size), skip, stop)
    for index in count(done):
        window = [Sequence(number, ids) for number, ids in islice(numbered, size)]
        if not window:
            return
        digest = _chain(digest, window)
        yield Window(index, window, digest)


def _chain(digest: str, sequences: list[Sequence]) -> str:
    state = hashlib.sha256(digest.encode())
    for sequence in sequences:
        state.update(array("q", [len(sequence.ids), *sequence.ids]).tobytes())
    return state.hexdigest()
