"""Refresh: long outputs drift away from what their prompt needed, so the neurons are chosen again now and then."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from transformers_patches.sparse.prompt_selection import Decoded

if TYPE_CHECKING:
    from transformers_patches.sparse.sparse_ffn import SparseFFN


class Refresh:
    """Every `every` decoded tokens, what they activate among all loaded neurons is added to the prompt's evidence.

    The inputs of the tokens since the last choice are kept and projected together, so that the loaded rows are read
    once per `every` tokens. A pass over a cache that was cut back begins again with the prompt's own choice. The
    result does not depend on how the tokens are spread over passes.
    """

    def __init__(self, ffn: SparseFFN, every: int) -> None:
        self.ffn, self.every = ffn, every
        self.reset()

    def reset(self) -> None:
        """Decoding begins anew, from the evidence that the selection has then."""
        self._inputs: list[torch.Tensor] = []  # [B, t, H] since the last choice
        self._pending = 0  # tokens in _inputs
        self._next = -1  # cached tokens at which decoding goes on
        self._at_prompt_end: dict | None = None

    def decode(self, x: torch.Tensor) -> Decoded:
        """x: [B, T, H]; as the selection's decode."""
        selection, start = self.ffn.selection, self.ffn.state.cached
        if self._at_prompt_end is None:
            self._at_prompt_end = _snapshot(selection)
        elif start != self._next:  # the cache was cut back
            _restore(selection, self._at_prompt_end)
            self._inputs, self._pending = [], 0
        self._next = start + x.shape[1]
        parts, computed, rows = [], 0, 0
        while x.shape[1]:
            taken = x[:, : self.every - self._pending]
            part = selection.decode(taken)
            parts.append(part.y)
            computed, rows = computed + part.computed, rows + part.rows
            self._inputs.append(taken)
            self._pending += taken.shape[1]
            if self._pending == self.every:
                rows += self._choose_again()
            x = x[:, taken.shape[1] :]
        return Decoded(torch.cat(parts, dim=1), computed, rows)

    def _choose_again(self) -> int:
        """Returns the rows of weights read for it."""
        ffn, inputs = self.ffn, torch.cat(self._inputs, dim=1)
        self._inputs, self._pending = [], 0
        ffn.observe(ffn.activations(inputs, ffn.all_rows(inputs.device)), None)
        return len(inputs) * ffn.plan.loaded_count * (ffn.matrices - 1)


def _snapshot(selection) -> dict:
    """The state of a selection; what is in it is replaced, not changed, by observing and choosing."""
    return {name: _copied(value) for name, value in vars(selection).items() if name != "ffn"}


def _copied(value):
    return [copy.copy(item) for item in value] if isinstance(value, list) else copy.copy(value)


def _restore(selection, state: dict) -> None:
    vars(selection).update({name: _copied(value) for name, value in state.items()})
