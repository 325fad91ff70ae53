"""Experts: those of one mixture, stored by neuron. T tokens, H hidden, k experts for each token."""

from __future__ import annotations

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.sparse.neuron_rows import NeuronRows


class Experts(nn.Module):
    """Computes the experts that the model's own router chose, each over its tokens, as transformers' module does.

    Takes the place of that module. An expert reads its own rows only, in any weight format.
    """

    def __init__(self, experts: list[NeuronRows]) -> None:
        super().__init__()
        self.rows = nn.ModuleList(experts)
        self._active: dict[int, kernels.ActiveNeurons] = {}  # of experts that few tokens have been through

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], the numbers of the chosen experts [T, k], what their outputs count [T, k]; returns [T, H]."""
        y = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            output = self._output(expert, x[tokens])
            y.index_add_(0, tokens, (output * weights[tokens, places, None]).to(y.dtype))
        return y

    def _output(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        rows = self.rows[expert]
        if rows.native_fits(x[None]):
            return kernels.ffn(x, self._all_of(expert))[0]
        every = rows.all(x.device)
        return rows.combine(rows.activations(x, every).h, every)

    def _all_of(self, expert: int) -> kernels.ActiveNeurons:
        if expert not in self._active:
            rows = self.rows[expert]
            self._active[expert] = kernels.ActiveNeurons(rows.projections(), rows.activation, rows.count)
        return self._active[expert]
