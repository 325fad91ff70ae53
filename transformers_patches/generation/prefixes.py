"""Prompts that begin alike: their common tokens are prefilled once (chat turns, system prompts).

Reuse does not show in the answer: a prompt goes on from what another one left at the end of a block (blocks.py), so that
each of its passes is the one that it would have had anyway. Neurons are chosen by what all of the prompt's tokens said;
that is kept at the ends of blocks, too. What decoding has added to a cache is dropped: it was computed with fewer
neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import Cache, PreTrainedModel

from transformers_patches.fast_pass.one_token import new_cache
from transformers_patches.generation.blocks import block_ends, turn_end
from transformers_patches.load.loaded_model import LoadedModel

MOST_PROMPTS, MOST_MARKS = 4, 4
MOST_BYTES = 1 << 29  # of keys and values


@dataclass
class _Prompt:
    """A prompt that was prefilled."""

    token_ids: list[int]
    cache: Cache  # its keys and values, perhaps followed by an answer's
    marks: dict[tuple[object, int], list] = field(default_factory=dict)  # evidence, by setting and length

    def mark(self, setting: object, length: int, evidence: list) -> None:
        """Keep the evidence of the first `length` tokens; beside it only the first and the last few."""
        self.marks[setting, length] = evidence
        for old in sorted(self.marks, key=lambda at: at[1])[1 : 1 - MOST_MARKS]:
            del self.marks[old]

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Prefixes:
    """The last prompts' caches, used by `generate` in the place of a Conversation. One answer at a time.

    setting: what evidence belongs to, to be set before an answer: settings that compute the same are equal.
    between: called after each block; what it raises ends the answer.
    reused: tokens of the last prompt that were not computed again.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.setting: object = None
        self.between: Callable[[], None] | None = None
        self.reused = 0
        self.token_ids: list[int] = []  # written by `generate`
        self._prompts: list[_Prompt] = []  # the last used one last
        self._current: _Prompt | None = None

    def prepare(self, prompt: list[int], model: PreTrainedModel) -> Cache:
        """A cache that holds the prompt's first blocks, or nothing."""
        found = [(self._usable(known, prompt), known) for known in self._prompts]
        length, known = max(found, key=lambda pair: pair[0], default=(0, None))
        self.reused = length
        if length:
            self.loaded.state.resume(known.marks.get((self.setting, length)))
            marks = {at: evidence for at, evidence in known.marks.items() if at[1] <= length}
            self._current = _Prompt(prompt, self._taken(known, prompt, length, model), marks)
        else:
            self._current = _Prompt(prompt, new_cache(model))
        self._store(self._current)
        return self._current.cache

    def reached(self, length: int) -> None:
        """The cache holds the prompt's first tokens, up to the end of a block."""
        if self.loaded.state.observes:
            self._current.mark(self.setting, length, self.loaded.state.collected())
        if self.between is not None:
            self.between()

    def forget(self) -> None:
        """Drop the last prompt: its pass was not completed."""
        self._prompts = [known for known in self._prompts if known is not self._current]
        self._current = None

    def _usable(self, known: _Prompt, prompt: list[int]) -> int:
        """How many of a stored prompt's tokens can be reused: up to the end of a block where evidence was kept."""
        if any(getattr(layer, "is_sliding", False) for layer in known.cache.layers):
            return 0  # a sliding window has forgotten what would be needed
        common = 0
        for ours, theirs in zip(known.token_ids, prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        if not self.loaded.state.observes:
            return max(block_ends(0, common + 1, turn_end(self.loaded.model, prompt[:common])), default=0)
        return max((at for setting, at in known.marks if setting == self.setting and at <= common), default=0)

    def _taken(self, known: _Prompt, prompt: list[int], length: int, model: PreTrainedModel) -> Cache:
        """The first tokens of a stored cache: itself if the prompt goes on from its prompt, else a copy."""
        if known.token_ids == prompt[: len(known.token_ids)]:
            self._prompts.remove(known)
            known.cache.crop(length - int(known.cache.get_seq_length()))
            return known.cache
        cache = new_cache(model)
        for number, layer in enumerate(known.cache.layers):
            cache.update(layer.keys[:, :, :length], layer.values[:, :, :length], number)
        return cache

    def _store(self, begun: _Prompt) -> None:
        self._prompts.append(begun)
        del self._prompts[:-MOST_PROMPTS]
        while len(self._prompts) > 1 and sum(known.nbytes for known in self._prompts[:-1]) > MOST_BYTES:
            del self._prompts[0]
