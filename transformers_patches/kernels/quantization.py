"""int8 and int4 weights: symmetric, one float16 scale per group of 32 columns, every row on its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_patches.errors import PartInferError

GROUP = 32
_ROWS_AT_ONCE = 1024  # bounds the float32 copies that quantising makes
_CANDIDATES = torch.linspace(0.8, 1.04, 13)


@dataclass(frozen=True)
class QuantizedTensor:
    """A [rows, columns] weight in 8 or 4 bits.

    data: int8 [rows, columns], or uint8 [rows, columns / 2]: value + 8 in four bits, byte k of a group's 16 holding
    column k (low bits) and column k + 16 (high bits). scales: float16 [rows, columns / 32]. Weight = scale * value.
    """

    data: Tensor
    scales: Tensor
    bits: int

    @property
    def shape(self) -> torch.Size:
        """[rows, columns] of the weight that this stands for."""
        return torch.Size((self.data.shape[0], self.scales.shape[1] * GROUP))

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return self.data.shape[0]

    def rows(self, chosen: Tensor | slice) -> QuantizedTensor:
        """Some of the rows: a view for a slice, a copy for indices."""
        return QuantizedTensor(self.data[chosen], self.scales[chosen], self.bits)


def quantize(weight: Tensor, bits: int, importance: Tensor | None = None) -> QuantizedTensor:
    """Quantise a float weight [rows, columns] to 8 or 4 bits.

    Without `importance`, a group's largest value is exact (in 4 bits as -8, so the scale may be negative). With it
    (float [columns], what an error in a column costs, e.g. the mean square of that input), scales a little smaller or
    larger are tried, and the one with the least weighted square error is taken.
    Raises PartInferError if columns is no multiple of 32 or bits is neither 8 nor 4.
    """
    if bits not in (4, 8):
        raise PartInferError(f"bits must be 4 or 8, got {bits}")
    if weight.ndim != 2 or weight.shape[1] % GROUP:
        raise PartInferError(
            f"a weight to quantise must be [rows, columns] with columns a multiple of {GROUP}, "
            f"got {list(weight.shape)}: keep it in bfloat16"
        )
    rows, columns = weight.shape
    data = torch.empty(rows, columns if bits == 8 else columns // 2, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(rows, columns // GROUP, dtype=torch.float16)
    cost = None if importance is None else importance.float().view(1, -1, GROUP)
    for start in range(0, rows, _ROWS_AT_ONCE):
        piece = slice(start, start + _ROWS_AT_ONCE)
        groups = weight[piece].float().view(-1, columns // GROUP, GROUP)
        scale = _exact_scale(groups, bits)
        if cost is not None:
            scale = _best_scale(groups, scale, cost, bits)
        scales[piece] = scale
        data[piece] = _pack(_round(groups, scale, bits), bits)
    return QuantizedTensor(data, scales, bits)


def dequantize(weight: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float weight [rows, columns] that a quantised one stands for."""
    rows, columns = weight.shape
    if weight.bits == 8:
        values = weight.data.view(rows, -1, GROUP)
    else:
        packed = weight.data.view(rows, -1, GROUP // 2)
        values = torch.cat((packed & 15, packed >> 4), dim=-1).to(torch.int8) - 8
    return (values * weight.scales.float().unsqueeze(-1)).view(rows, columns).to(dtype)


def _exact_scale(groups: Tensor, bits: int) -> Tensor:
    """float16 scales [rows, groups] that keep each group's largest value."""
    if bits == 8:
        return (groups.abs().amax(-1) / 127).half()
    lowest, highest = groups.aminmax(dim=-1)
    return (torch.where(highest > -lowest, highest, lowest) / -8).half()


def _round(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    scale = scale.float().unsqueeze(-1)
    values = torch.where(scale == 0, 0.0, groups / scale).round_()
    return values.clamp_(-127, 127) if bits == 8 else values.clamp_(-8, 7)


def _best_scale(groups: Tensor, scale: Tensor, cost: Tensor, bits: int) -> Tensor:
    best, least = scale, torch.full(scale.shape, torch.inf)
    for factor in _CANDIDATES:
        candidate = (scale.float() * factor).half()
        restored = _round(groups, candidate, bits) * candidate.float().unsqueeze(-1)
        error = ((groups - restored).square_() * cost).sum(-1)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def _pack(values: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return values.to(torch.int8).flatten(1)
    nibbles = (values + 8).to(torch.uint8)
    return (nibbles[..., : GROUP // 2] | nibbles[..., GROUP // 2 :] << 4).flatten(1)
