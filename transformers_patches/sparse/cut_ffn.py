"""CutFFN: a gated FFN that itself leaves out most of its neurons for every token, as Gemma 3n's first layers do.

What is left out is 0 in the model too, so its rows of up and down are not read: exact, with dense quality. H hidden, N
neurons.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.structure.activations import cutoff


class CutFFN(nn.Module):
    """down(act(relu(gate·x - c)) * (up·x)), c being a bound over all neurons' gate·x. x: [..., H].

    share: of the neurons that is left out, if gate·x were normally distributed.
    """

    def __init__(self, rows: NeuronRows, share: float) -> None:
        super().__init__()
        self.rows, self.share = rows, share
        self._projections: kernels.Projections | None = None
        self.reset_counters()

    def reset_counters(self) -> None:
        self.tokens = self.neurons = 0  # tokens that were computed one by one, and the neurons that were left

    def unread_bytes(self) -> float:
        """Bytes of rows that a token has left unread on average."""
        if not self.tokens:
            return 0.0
        unread = self.rows.count - self.neurons / self.tokens
        return unread / self.rows.count * sum(self.rows.weight(name).nbytes for name in ("up", "down"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.rows.all(x.device)
        gate = self.rows.project(x, rows, "gate")
        bound = cutoff(gate, self.share)
        if self.rows.kernel_activation is not None and x[..., 0].numel() == 1:
            return self._one_token(x, gate.flatten(), bound)
        h = self.rows.act_fn(nn.functional.relu(gate - bound)) * self.rows.project(x, rows, "up")
        return self.rows.combine(h, rows)

    def _one_token(self, x: torch.Tensor, gate: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        """The neurons above the bound only; it is subtracted as if it were a bias of gate."""
        index = (gate > bound.flatten()).nonzero().squeeze(1).int()
        if self._projections is None:
            self._projections = self.rows.projections()
        _, *others = self._projections.biases
        shifted = replace(self._projections, biases=[(-bound).flatten().expand_as(gate).contiguous(), *others])
        active = kernels.ActiveNeurons(shifted, self.rows.activation, 0, index)
        self.tokens, self.neurons = self.tokens + 1, self.neurons + len(index)
        return kernels.ffn(x, active)[0]
