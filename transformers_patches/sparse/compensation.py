"""Compensation: what stands in for neurons that are not loaded or not computed.

`mean`     b = sum over the neurons i that are left out of E[h_i] W_down[:, i], added to the output. E is the neuron
           file's mean; for loaded neurons that the prompt did not select it is blended with the prompt's own mean.
`refit`    the loaded neurons' down rows, refitted by least squares so that they also write what the missing ones wrote
           (`python -m profiler fit`); with it come the biases that make the error zero on average, one for prefill and
           one for decoding.
"""

from __future__ import annotations

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.kernels import Weight
from transformers_patches.sparse.prior import PRIOR_TOKENS


class Compensation(nn.Module):
    """What one layer adds to the output of its computed neurons.

    bias_prefill, bias_decode: [H]. They count as weights of the model.
    """

    def __init__(self, bias_prefill: torch.Tensor, bias_decode: torch.Tensor) -> None:
        super().__init__()
        self.bias_prefill = nn.Parameter(bias_prefill.contiguous(), requires_grad=False)
        self.bias_decode = nn.Parameter(bias_decode.contiguous(), requires_grad=False)

    def add(self, y: torch.Tensor, *, prefill: bool) -> torch.Tensor:
        """y [..., H], the output of the computed neurons, and what stands in for the others."""
        return y + (self.bias_prefill if prefill else self.bias_decode)


class PromptMean:
    """E[h] of the loaded neurons for one sequence: the neuron file's, blended with the prompt's own."""

    def __init__(self, mean: torch.Tensor) -> None:
        """mean: float32 [L]."""
        self.mean, self.sums, self.tokens = mean, torch.zeros_like(mean), 0

    def observe(self, h: torch.Tensor) -> None:
        """h: [T, L] of prompt tokens, no padding."""
        self.sums = h.float().sum(0).add_(self.sums)
        self.tokens += len(h)

    def left_out(self, down: Weight, computed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[H]: what the loaded neurons that are not among the positions `computed` write on average. down: [L, H]."""
        mean = (self.sums + PRIOR_TOKENS * self.mean) / (self.tokens + PRIOR_TOKENS)
        mean = mean.index_fill(0, computed.long(), 0.0)
        return kernels.combine(mean.to(dtype)[None], down)[0]
