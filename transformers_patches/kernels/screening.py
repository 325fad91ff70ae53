"""Products with a large weight of which only some outputs are exact; for the others, 4 of the 8 bits are read.

The lm_head computes a logit for every token of the vocabulary, and few of them matter. The high plane of an 8-bit
weight is itself a weight of 4 bits: it shows which logits may be large, and only those are computed with the whole
weight. The idea is that of SVD-softmax (Shim et al., NeurIPS 2017), with bits in place of singular values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_patches.kernels.formats import GROUP, INT4
from transformers_patches.kernels.quantization import QuantizedTensor, dequantize

LOW_MIDDLE, LOW_VARIANCE = 7.5, 255 / 12  # mean and variance of low nibbles 0 … 15, taken as evenly distributed
DEVIATIONS, DEVIATIONS_OF_SEVERAL = 8.0, 4.0
LEVELS = [2.0 + 0.75 * k for k in range(24)]  # below the largest logit


@dataclass(frozen=True)
class Needed:
    """Which of a product's outputs must be exact.

    largest: how many of the largest outputs; 0: those that the softmax needs.
    tolerance: the largest expected KL divergence of the softmax from the exact one, in nats.
    temperature: outputs are divided by it before the softmax.
    """

    largest: int = 0
    tolerance: float = 1e-3
    temperature: float = 1.0

    @property
    def arguments(self) -> tuple[int, float, float]:
        """As the native operations take them."""
        return self.largest, self.tolerance, self.temperature


SOFTMAX = Needed()


@dataclass(frozen=True)
class Screen:
    """What a weight [V, H] is screened with: the high plane of its 8-bit values.

    data: uint8 [V, H / 2], or both planes [2, V, H / 2].
    scales: float16 [V, H / 32], of the 8-bit values.
    errors: float32 [H / 32], the mean square error of the high plane's weights in each group of columns.
    """

    data: Tensor
    scales: Tensor
    errors: Tensor

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Screen:
        """weight: in planes, or its high plane alone as a weight of 4 bits."""
        total = torch.zeros(weight.scales.shape[1], dtype=torch.float64, device=weight.device)
        for scales in weight.scales.split(2**16):
            total += scales.double().square_().sum(0)
        return cls(weight.data, weight.scales, (total * (LOW_VARIANCE / max(1, len(weight)))).float())

    def coarse(self) -> Tensor:
        """The weight as the high plane alone gives it: float32 [V, H]."""
        high = QuantizedTensor(self.data if self.data.ndim == 2 else self.data[0], self.scales, INT4)
        return 16 * dequantize(high) + LOW_MIDDLE * self.scales.float().repeat_interleave(GROUP, dim=1)


def screened_linear(
    x: Tensor, weight: Tensor | QuantizedTensor, screen: Screen, needed: Needed
) -> tuple[Tensor, Tensor]:
    """`kernels.screened_linear` in PyTorch."""
    exact = x.float() @ (dequantize(weight) if isinstance(weight, QuantizedTensor) else weight.float()).T
    rough = x.float() @ screen.coarse().T
    error = (x.float().unflatten(-1, (-1, GROUP)).square().sum(-1) * screen.errors).sum(-1)
    rows = rough.flatten(0, -2)
    depth = torch.tensor([_depth(row, float(e), needed) for row, e in zip(rows, error.flatten(), strict=True)])
    chosen = rows >= rows.amax(-1, keepdim=True) - depth[:, None]
    out = torch.where(chosen.view(rough.shape), exact, rough)
    return out.to(x.dtype), chosen.sum(-1)


def _depth(logits: Tensor, error: float, needed: Needed) -> float:
    """How far below the largest rough logit outputs are still computed exactly."""
    below = logits.max() - logits
    counts = [int((below <= level).sum()) for level in LEVELS]
    if needed.largest:
        level = next((level for level, n in zip(LEVELS, counts, strict=True) if n >= needed.largest), LEVELS[-1])
        if needed.largest == 1:
            return DEVIATIONS * math.sqrt(error)
        return level + DEVIATIONS_OF_SEVERAL * math.sqrt(error)
    step = LEVELS[1] - LEVELS[0]
    middles = [LEVELS[0] / 2, *(level - step / 2 for level in LEVELS[1:]), LEVELS[-1] + step / 2]
    mass = [
        (after - before) * math.exp(-middle / needed.temperature)
        for before, after, middle in zip([0, *counts], [*counts, len(logits)], middles, strict=True)
    ]
    rough, k = mass[-1], len(LEVELS) - 1
    while k > 0:
        rough += mass[k]
        if rough * error > 2 * needed.tolerance * needed.temperature**2 * sum(mass):
            break
        k -= 1
    return LEVELS[k]
