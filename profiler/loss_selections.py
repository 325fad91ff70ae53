"""Selections that only measuring needs: everything that is loaded, and several choices over the same prompt."""

from __future__ import annotations

from dataclasses import replace

import torch

from transformers_patches.plan.load_plan import candidate_count, kept_count
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.sparse.prior import Prior
from transformers_patches.sparse.selection import Decoded, Selection, SequenceActivations
from transformers_patches.sparse.sparse_ffn import SparseFFN
from transformers_patches.sparse.token_selection import TokenSelection


class Everything(Selection):
    """Computes every loaded neuron."""

    observes, started = False, True

    def __init__(self, rows: NeuronRows) -> None:
        self.rows = rows

    def reset(self) -> None: ...

    def begin(self, batch: int, device: torch.device) -> None: ...

    def observe(self, sequence: int, activations: SequenceActivations) -> None: ...

    def choose(self) -> None: ...

    def decode(self, x: torch.Tensor) -> Decoded:
        rows = self.rows.all(x.device)
        return Decoded(self.rows.combine(self.rows.activations(x, rows).h, rows), 0, 0)

    def active_neurons(self, x: torch.Tensor) -> None:
        return None

    def rows_read(self, computed: int) -> int:
        return computed * self.rows.matrices


class InTurn(Everything):
    """Several selections over the same rows: all of them see the prompt, one of them, `current`, decodes."""

    observes = True

    def __init__(self, rows: NeuronRows, selections: list[Selection]) -> None:
        super().__init__(rows)
        self.selections, self.current = selections, 0
        self._watching = [selection for selection in selections if selection.observes]

    @property
    def started(self) -> bool:
        return all(selection.started for selection in self.selections)

    def reset(self) -> None:
        for selection in self.selections:
            selection.reset()

    def begin(self, batch: int, device: torch.device) -> None:
        for selection in self._watching:
            selection.begin(batch, device)

    def observe(self, sequence: int, activations: SequenceActivations) -> None:
        for selection in self._watching:
            selection.observe(sequence, activations)

    def choose(self) -> None:
        for selection in self._watching:
            selection.choose()

    def decode(self, x: torch.Tensor) -> Decoded:
        return self.selections[self.current].decode(x)


def selection_at(
    ffn: SparseFFN, intermediate_size: int, sparsity: float, prior: Prior | None = None, *, average: bool
) -> Selection:
    """The selection per token that a model loaded with this `sparsity` would have; of everything loaded at 1.

    ffn: of a model that was loaded with selection `up`; prior: other than that one's.
    """
    rows, plan, prior = ffn.rows, ffn.selection.plan, prior or ffn.selection.prior
    candidates = candidate_count(sparsity, plan.loaded_count, intermediate_size)
    kept = kept_count(sparsity, candidates, intermediate_size, rows.matrices)
    if kept == plan.loaded_count:
        return Everything(rows)
    changed = replace(
        plan, candidate_count=candidates, computed_count=kept, base_count=min(plan.base_count, candidates)
    )
    return TokenSelection(rows, changed, prior, "up", average=average)
