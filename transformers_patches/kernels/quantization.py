"""int8 and int4 weights: symmetric, one float16 scale per group of 32 columns, every row on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transformers_patches.errors import PartInferError

GROUP = 32
_VALUES_AT_ONCE = 2**20  # bounds the float32 copies that quantising makes
_CANDIDATES = {  # by bits: times the scale that makes the largest value exact
    8: [0.992 + 0.008 * step for step in range(9)],
    4: [0.8 + 0.02 * step for step in range(13)],
}
# How large a column's largest value is beside its scale: so that the scales of groups are normal float16s.
COLUMN_RANGE = 64.0


@dataclass(frozen=True)
class QuantizedTensor:
    """A [rows, columns] weight in 8 or 4 bits.

    data: int8 [rows, columns], or uint8 [rows, columns / 2]: value + 8 in four bits, byte k of a group's 16 holding
    column k (low bits) and column k + 16 (high bits). scales: float16 [rows, columns / 32]. Weight = scale * value.
    8 bits may also be in two planes of such nibbles, data uint8 [2, rows, columns / 2]: value + 128 = 16 high + low.
    column_scales: float32 [columns] or None, what each column is multiplied with besides: where columns are the outputs of
    what is summed up row by row, one large column would take the range of its whole group.
    """

    data: Tensor
    scales: Tensor
    bits: int
    column_scales: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[rows, columns] of the weight that this stands for."""
        return torch.Size((self.scales.shape[0], self.scales.shape[1] * GROUP))

    @property
    def in_planes(self) -> bool:
        return self.data.ndim == 3

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> list[Tensor]:
        """All tensors that it consists of."""
        return [self.data, self.scales, *([] if self.column_scales is None else [self.column_scales])]

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __len__(self) -> int:
        return self.scales.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> QuantizedTensor:
        """Some of the rows: a view for a slice, a copy for indices."""
        return replace(self, data=self.data[..., rows, :], scales=self.scales[rows])

    def index_select(self, dim: int, index: Tensor) -> QuantizedTensor:
        """A copy of some rows; dim must be 0."""
        return replace(self, data=self.data.index_select(dim - 2, index), scales=self.scales.index_select(dim, index))

    def to(self, device: torch.device, *, non_blocking: bool = False) -> QuantizedTensor:
        """The same on another device."""
        moved = self._each(lambda part: part.to(device, non_blocking=non_blocking))
        return self if moved.data is self.data else moved

    def like(self, empty: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """One of the same shape and bits in memory that `empty` gives for its data and its scales."""
        return self.over(empty(self.data), empty(self.scales))

    def over(self, data: Tensor, scales: Tensor) -> QuantizedTensor:
        """One like this whose data and scales are these, and whose column scales are still to be filled."""
        columns = None if self.column_scales is None else torch.empty_like(self.column_scales, device=data.device)
        return replace(self, data=data, scales=scales, column_scales=columns)

    def pin_memory(self) -> QuantizedTensor:
        """A copy in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        columns = None if self.column_scales is None else change(self.column_scales)
        return replace(self, data=change(self.data), scales=change(self.scales), column_scales=columns)

    def put(self, rows: Tensor | slice, values: QuantizedTensor) -> None:
        """Take over some rows from another one of the same layout and column scales."""
        self.data[..., rows, :], self.scales[rows] = values.data, values.scales

    def copy_(self, other: QuantizedTensor) -> None:
        """Take over the values of another one of the same shape and bits."""
        for own, others in zip(self.parts, other.parts, strict=True):
            own.copy_(others)

    @classmethod
    def empty(
        cls,
        rows: int,
        columns: int,
        bits: int,
        device: torch.device | str = "cpu",
        *,
        in_planes: bool = False,
        column_scales: bool = False,
    ) -> QuantizedTensor:
        """Memory for a [rows, columns] weight. Raises PartInferError if columns is no multiple of 32 or bits not 4 or 8."""
        if bits not in (4, 8):
            raise PartInferError(f"bits must be 4 or 8, got {bits}")
        if columns % GROUP:
            raise PartInferError(
                f"a weight to quantise must be [rows, columns] with columns a multiple of {GROUP}, "
                f"got [{rows}, {columns}]: keep it in bfloat16"
            )
        if bits == 8 and not in_planes:
            data = torch.empty(rows, columns, dtype=torch.int8, device=device)
        else:
            planes = (2,) if in_planes else ()
            data = torch.empty(*planes, rows, columns // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(rows, columns // GROUP, dtype=torch.float16, device=device)
        return cls(data, scales, bits, torch.empty(columns, device=device) if column_scales else None)


def quantize(weight: Tensor, bits: int, column_weights: Tensor | None = None) -> QuantizedTensor:
    """`kernels.quantize` in PyTorch."""
    if weight.ndim != 2:
        raise PartInferError(f"a weight to quantise must be [rows, columns], got {list(weight.shape)}")
    rows, columns = weight.shape
    check_column_weights(column_weights, columns)
    result = QuantizedTensor.empty(rows, columns, bits, weight.device)
    step = max(1, _VALUES_AT_ONCE // columns)
    important = None if column_weights is None else column_weights.to(weight.device).view(-1, GROUP)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        groups = weight[piece].float().view(-1, columns // GROUP, GROUP)
        scale = _exact_scale(groups, bits)
        if bits == 4 or important is not None:
            scale = _best_scale(groups, scale, bits, important)
        result.scales[piece] = scale
        result.data[piece] = _pack(_round(groups, scale, bits), bits)
    return result


def check_column_weights(column_weights: Tensor | None, columns: int) -> None:
    """PartInferError unless they are float32 [columns]."""
    if column_weights is None or (column_weights.dtype == torch.float32 and column_weights.shape == (columns,)):
        return
    raise PartInferError(
        f"column weights must be float32 [{columns}], got {column_weights.dtype} {list(column_weights.shape)}: "
        "use a neuron file made from this model"
    )


def split_planes(weight: QuantizedTensor) -> QuantizedTensor:
    """An 8-bit weight, int8 [rows, columns], in planes."""
    groups = (weight.data.view(torch.uint8) ^ 128).view(len(weight), -1, 2, GROUP // 2)
    first, second = groups[:, :, 0], groups[:, :, 1]
    planes = [first >> 4 | second & 0xF0, first & 15 | second << 4]
    return QuantizedTensor(torch.stack([plane.flatten(1) for plane in planes]), weight.scales, 8)


def join_planes(weight: QuantizedTensor) -> QuantizedTensor:
    """The same weight as int8 [rows, columns]."""
    high, low = weight.data.view(2, len(weight), -1, GROUP // 2)
    first, second = (high & 15) << 4 | low & 15, high & 0xF0 | low >> 4
    values = torch.stack([first, second], dim=2).flatten(1) ^ 128
    return QuantizedTensor(values.view(torch.int8), weight.scales, 8)


def dequantize(weight: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float weight [rows, columns] that a quantised one stands for."""
    weight = join_planes(weight) if weight.in_planes else weight
    rows, columns = weight.shape
    if weight.bits == 8:
        values = weight.data.view(rows, -1, GROUP)
    else:
        packed = weight.data.view(rows, -1, GROUP // 2)
        values = torch.cat((packed & 15, packed >> 4), dim=-1).to(torch.int8) - 8
    floats = (values * weight.scales.float().unsqueeze(-1)).view(rows, columns)
    return (floats if weight.column_scales is None else floats * weight.column_scales).to(dtype)


def column_scales(largest: Tensor) -> Tensor:
    """The column scales of a weight whose columns have these largest sizes: float32 [columns] each."""
    return torch.where(largest > 0, largest / COLUMN_RANGE, 1.0)


def _exact_scale(groups: Tensor, bits: int) -> Tensor:
    """float16 scales [rows, groups] that keep each group's largest value."""
    if bits == 8:
        return (groups.abs().amax(-1) / 127).half()
    lowest, highest = groups.aminmax(dim=-1)
    return (torch.where(highest > -lowest, highest, lowest) / -8).half()


def _round(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    scale = scale.float().unsqueeze(-1)
    values = groups * torch.where(scale == 0, 0.0, 1 / scale)
    return (values.clamp_(-127, 127) if bits == 8 else values.clamp_(-8, 7)).round_()


def _best_scale(groups: Tensor, scale: Tensor, bits: int, column_weights: Tensor | None) -> Tensor:
    """With 4 bits large values, of which there are few, count most, in the error and in what a layer computes.

    column_weights: [groups, 32], what the errors of a column count besides.
    """
    importance = groups.abs() if bits == 4 else torch.ones_like(groups)
    importance = importance if column_weights is None else importance * column_weights
    best, least = scale, torch.full_like(scale, torch.inf, dtype=torch.float32)
    for factor in _CANDIDATES[bits]:
        candidate = (scale.float() * factor).half()
        restored = _round(groups, candidate, bits) * candidate.float().unsqueeze(-1)
        error = ((groups - restored).square_() * importance).sum(-1)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def _pack(values: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return values.to(torch.int8).flatten(1)
    nibbles = (values + 8).to(torch.uint8)
    return (nibbles[..., : GROUP // 2] | nibbles[..., GROUP // 2 :] << 4).flatten(1)
