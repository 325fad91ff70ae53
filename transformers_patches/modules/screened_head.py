"""Output projections whose logits are computed exactly only where they matter, one token of each sequence at a time.

A head of 8 bits is held in two planes of 4 bits, which takes no more memory. A float head has the high plane beside it,
which takes 0.5625 bytes for a weight (`--screen_head on`).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from transformers_patches import kernels
from transformers_patches.kernels import INT4, INT8, QuantizedTensor
from transformers_patches.modules.fast_linear import FastLinear
from transformers_patches.modules.quantized import QuantizedLinear, QuantizedWeight, weight_of
from transformers_patches.weights.memory import WeightMemory
from transformers_patches.weights.source import pieces

MOST_SEQUENCES = 32  # whose tokens are screened together


class ScreenedHead(nn.Module):
    """x [..., H] -> logits [..., V], like the linear layer that it replaces, whose parameters it shares.

    Passes over one token of each sequence are screened; where more positions are scored, all logits are exact.
    tokens, exact: what screened passes counted since the last reset.
    """

    def __init__(self, linear: FastLinear | QuantizedLinear, high: QuantizedWeight | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.high = linear.weight, None, high
        self._whole = linear.forward
        first = self._first_plane
        self._screen = first, kernels.Screen.of(first)  # a pass over all scales: here, not with the first token
        self.reset_counters()

    @property
    def packed(self) -> torch.Tensor | QuantizedTensor:
        """The weight as the kernels take it."""
        return weight_of(self.weight)

    @property
    def screen(self) -> kernels.Screen:
        """What the weight is screened with."""
        first = self._first_plane
        if self._screen[0] is not first:  # another weight by now
            self._screen = first, kernels.Screen.of(first)
        return self._screen[1]

    @property
    def _first_plane(self) -> QuantizedTensor:
        """What holds the high plane."""
        return (self.high or self.weight).packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 3 or x.shape[1] != 1 or len(x) > MOST_SEQUENCES:
            return self._whole(x)
        logits, exact = kernels.screened_linear(x, self.packed, self.screen)
        self.count(len(x), int(exact.sum()))
        return logits

    def count(self, tokens: int, exact: int) -> None:
        self.tokens += tokens
        self.exact += exact

    def reset_counters(self) -> None:
        self.tokens = self.exact = 0

    def unread_bytes(self) -> float:
        """Bytes of the weight that a token did not read on average; 0 if nothing was counted."""
        if not self.tokens:
            return 0.0
        refining = self.weight.nbytes if self.high is not None else self.weight.packed.data.nbytes / 2
        return refining * (1 - self.exact / (self.tokens * self.out_features))


def can_be_screened(head: nn.Linear) -> bool:
    """Whether screening is made for a model's head. With 8 bits, it must then be in planes."""
    return head.bias is None and head.in_features % INT8.group == 0


def screen_head(model: PreTrainedModel, memory: WeightMemory) -> None:
    """Put a ScreenedHead in place of a loaded model's head if that is in planes, or of a float type.

    For models on a CPU, with native kernels.
    """
    head = model.get_output_embeddings()
    if isinstance(head, QuantizedLinear) and head.weight.packed.in_planes:
        model.set_output_embeddings(ScreenedHead(head, None))
    elif isinstance(head, FastLinear) and can_be_screened(head):
        model.set_output_embeddings(ScreenedHead(head, _high_plane(head.weight.detach(), memory)))


def _high_plane(weight: torch.Tensor, memory: WeightMemory) -> QuantizedWeight:
    high = QuantizedWeight(*weight.shape, INT4)
    high.fill(high.packed.like(lambda like: memory.empty(like.shape, like.dtype, torch.device("cpu"))))
    for rows in pieces(weight):
        packed = kernels.split_planes(kernels.quantize(weight[rows], INT8))
        high.packed.put(rows, QuantizedTensor(packed.data[0], packed.scales, INT4))
    return high
