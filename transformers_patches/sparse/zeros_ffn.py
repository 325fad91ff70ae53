"""ZerosFFN: a plain FFN whose activation is 0 for most neurons, as with ReLU and its square.

The rows of down of those neurons are not read: exact, with dense quality. H hidden, N neurons.
"""

from __future__ import annotations

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.sparse.neuron_rows import NeuronRows

MADE_BY = ("relu", "relu2")  # activations that are 0 for whatever is below 0


class ZerosFFN(nn.Module):
    """down(act(up·x + b)) + c. x: [..., H]."""

    def __init__(self, rows: NeuronRows, *, output_bias: bool) -> None:
        super().__init__()
        self.rows = rows
        self.output_bias = nn.Parameter(torch.empty(rows.hidden_size), requires_grad=False) if output_bias else None
        self._active: kernels.ActiveNeurons | None = None
        self.reset_counters()

    def reset_counters(self) -> None:
        self.tokens = self.neurons = 0  # tokens that were computed one by one, and their neurons that are not 0

    def unread_bytes(self) -> float:
        """Bytes of rows that a token has left unread on average."""
        if not self.tokens:
            return 0.0
        unread = self.rows.count - self.neurons / self.tokens
        return unread / self.rows.count * self.rows.weight("down").nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x[..., 0].numel() == 1:
            y, computed = kernels.ffn(x, self._nonzero())
            self.tokens, self.neurons = self.tokens + 1, self.neurons + int(computed)
        else:
            rows = self.rows.all(x.device)
            y = self.rows.combine(self.rows.activations(x, rows).h, rows)
        return y if self.output_bias is None else y + self.output_bias

    def _nonzero(self) -> kernels.ActiveNeurons:
        """Each token's choice of the neurons with |h| above 0, which are then the only ones whose down is read."""
        if self._active is None:
            every = torch.ones(self.rows.count)
            projections, activation = self.rows.projections(), self.rows.activation
            self._active = kernels.ActiveNeurons(projections, activation, self.rows.count, size=every)
        return self._active
