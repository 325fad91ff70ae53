"""From texts to token sequences, and on to windows of batches of similar length, in a fixed order."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice

from transformers import PreTrainedTokenizerBase

from profiler.templates import Prompt
from transformers_patches.errors import PartInferError
from transformers_patches.generation.chat_template import apply_chat_template


@dataclass(frozen=True)
class Sequence:
    """The token ids of a text."""

    number: int  # its place in the source, from 0
    ids: list[int]


class Encoder:
    """Turns prompts into at most `max_length` token ids each.

    chat_template: wrap each prompt in the model's chat template, as a message of the user
    split: cut long texts into pieces (for language modelling) instead of keeping only their beginning
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
        """The token ids of the prompts, in their order."""
        for prompt in prompts:
            if self.split:
                yield from self._pieces(prompt)
            else:
                yield self._encode(prompt)

    def _encode(self, prompt: Prompt) -> list[int]:
        """A prompt's ids. If it is too long, its beginning and the end of the template are kept."""
        text, suffix = prompt.text, prompt.suffix
        if self.chat_template:
            messages = [{"role": "user", "content": text}]
            text = apply_chat_template(self.tokenizer, messages)
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
        """The ids that the tokenizer puts before every text, such as a begin-of-text token."""
        with_special = self.tokenizer("a")["input_ids"]
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return with_special[: len(with_special) - len(plain)] if with_special[-len(plain) :] == plain else []


@dataclass(frozen=True)
class Window:
    """Consecutive sequences that are sorted into batches together. A checkpoint is written after each window."""

    index: int  # from 0
    sequences: list[Sequence]  # in the order of the source
    digest: str  # of all sequences up to the end of the window, to notice texts that have changed

    def batches(self, batch_size: int) -> list[list[Sequence]]:
        """Batches of similar length, the longest first, so that running out of memory happens early."""
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
    """Group sequences `skip` to `skip + limit` into windows of `size`. Memory holds one window at a time.

    done, digest: if the source continues an earlier run, the number of windows it had done, and their digest
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
