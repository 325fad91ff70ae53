"""Selection: what every way to choose the neurons of a decoded token has to offer to SparseFFN.

prompt_selection.py chooses once per prompt, token_selection.py for every token.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch

from transformers_patches import kernels
from transformers_patches.sparse.neuron_rows import Activations


class SequenceActivations:
    """The Activations of all loaded neurons at one sequence's tokens, no padding: [T, L] each, cut out on demand."""

    def __init__(self, values: Activations, sequence: int, token_mask: torch.Tensor | None) -> None:
        """values: [B, T, L] each; token_mask: bool [B, T], False where padding, or None."""
        self._values, self._sequence, self._mask = values, sequence, token_mask

    @cached_property
    def first(self) -> torch.Tensor:
        return self._cut(self._values.first)

    @cached_property
    def up(self) -> torch.Tensor:
        return self._cut(self._values.up)

    @cached_property
    def h(self) -> torch.Tensor:
        return self._cut(self._values.h)

    def _cut(self, part: torch.Tensor) -> torch.Tensor:
        tokens = part[self._sequence]
        return tokens if self._mask is None else tokens[self._mask[self._sequence]]


@dataclass(frozen=True)
class Decoded:
    """The result of a decode pass."""

    y: torch.Tensor  # the output, in the shape of the input
    computed: int  # neurons that were computed, summed over the tokens
    rows: int  # rows of weights that were read, summed over the tokens


class Selection(ABC):
    """Chooses neurons for the sequences of a request, and decodes with them.

    For each request: `begin`, then `observe` for every sequence and `choose` after each pass over prompt tokens, then
    `decode`. Observing replaces tensors and changes none in place, so that `collected` can be kept and taken up again.
    """

    COLLECTED: tuple[str, ...] = ()  # names of what `begin` makes and `observe` fills

    def collected(self) -> dict[str, object]:
        """What the prompt has told so far, for `resume`."""
        return {name: _copied(getattr(self, name)) for name in self.COLLECTED}

    def resume(self, collected: dict[str, object]) -> None:
        """Go on from what another prompt had told, of which this one has the same first tokens."""
        self.reset()
        for name, value in collected.items():
            setattr(self, name, _copied(value))

    @property
    @abstractmethod
    def observes(self) -> bool:
        """Whether prompts decide anything: if not, begin, observe and choose are not called."""

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether `begin` was called for the request."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the request."""

    @abstractmethod
    def begin(self, batch: int, device: torch.device) -> None:
        """Evidence of `batch` sequences, none so far."""

    @abstractmethod
    def observe(self, sequence: int, activations: SequenceActivations) -> None:
        """Take in one sequence's prompt tokens."""

    @abstractmethod
    def choose(self) -> None:
        """Choose from what was observed so far."""

    @abstractmethod
    def decode(self, x: torch.Tensor) -> Decoded:
        """x: [B, T, H]. Raises RuntimeError if a prompt must come first."""

    @abstractmethod
    def active_neurons(self, x: torch.Tensor) -> kernels.ActiveNeurons | None:
        """What a token of a single sequence computes, for the native decoder.

        None if it can't compute that, if there are several sequences, or if nothing was chosen yet.

        x: any hidden states, for their type.
        """

    @abstractmethod
    def rows_read(self, computed: int) -> int:
        """Rows of weights that a token reads if it computes so many neurons."""


def _copied(parts: object) -> object:
    """A list's objects as shallow copies; anything else as it is."""
    return [copy.copy(part) for part in parts] if isinstance(parts, list) else parts
