"""QuantizedTensor: a weight in one of the formats of formats.py, and in PyTorch what the native kernels do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transformers_patches.errors import PartInferError
from transformers_patches.kernels.formats import GROUP, WeightFormat

_VALUES_AT_ONCE = 2**20  # bounds the float32 copies made while quantising
# A column's largest value divided by its column scale: keeps the scales of groups in float16's normal range.
COLUMN_RANGE = 64.0


@dataclass(frozen=True)
class QuantizedTensor:
    """A [rows, columns] weight in few bits.

    data: the packed values, [rows, …] as the format has them, or [2, rows, …] in planes.
    scales: [rows, columns / group, …] as the format has them.
    format: how values are packed, and what they stand for.
    column_scales: float32 [columns], a further factor for each column, or None. Weights whose columns are outputs have
        them: a single large column would otherwise use up the range of its whole group.
    """

    data: Tensor
    scales: Tensor
    format: WeightFormat
    column_scales: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[rows, columns] of the weight that this stands for."""
        return torch.Size((self.scales.shape[0], self.scales.shape[1] * self.format.group))

    @property
    def native_code(self) -> int:
        """The native operations' number for the format, which must have a native kernel."""
        return self.format.native.code

    @property
    def in_planes(self) -> bool:
        """Whether 8 bits are in two planes of four: high ones and low ones."""
        return self.data.ndim == 3

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> list[Tensor]:
        """All tensors that this weight consists of."""
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
        """An uninitialised weight of the same shape and format; `empty` allocates a tensor like the one it is given."""
        return self.over(empty(self.data), empty(self.scales))

    def over(self, data: Tensor, scales: Tensor) -> QuantizedTensor:
        """A weight like this one over the given data and scales, with uninitialised column scales."""
        columns = None if self.column_scales is None else torch.empty_like(self.column_scales, device=data.device)
        return replace(self, data=data, scales=scales, column_scales=columns)

    def pin_memory(self) -> QuantizedTensor:
        """A copy in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        columns = None if self.column_scales is None else change(self.column_scales)
        return replace(self, data=change(self.data), scales=change(self.scales), column_scales=columns)

    def put(self, rows: Tensor | slice, values: QuantizedTensor) -> None:
        """Copy `values`, of the same layout and column scales, into some of the rows."""
        self.data[..., rows, :], self.scales[rows] = values.data, values.scales

    def copy_(self, other: QuantizedTensor) -> None:
        """Copy another weight of the same shape and format into this one."""
        for own, others in zip(self.parts, other.parts, strict=True):
            own.copy_(others)

    @classmethod
    def empty(
        cls,
        rows: int,
        columns: int,
        weight_format: WeightFormat,
        device: torch.device | str = "cpu",
        *,
        in_planes: bool = False,
        column_scales: bool = False,
    ) -> QuantizedTensor:
        """An uninitialised [rows, columns] weight.

        Raises PartInferError if columns is not a multiple of the group size.
        """
        if columns % weight_format.group:
            raise PartInferError(
                f"a weight to quantise must be [rows, columns] with columns a multiple of {weight_format.group}, "
                f"got [{rows}, {columns}]: keep it in bfloat16"
            )
        if in_planes and not weight_format.splits:
            raise ValueError(f"{weight_format.name} weights can't be in planes")
        data, scales = weight_format.empty(rows, columns, device)
        if in_planes:
            data = torch.empty(2, rows, columns // 2, dtype=torch.uint8, device=device)
        return cls(data, scales, weight_format, torch.empty(columns, device=device) if column_scales else None)


Weight = Tensor | QuantizedTensor


def quantize(weight: Tensor, weight_format: WeightFormat, column_weights: Tensor | None = None) -> QuantizedTensor:
    """`kernels.quantize` in PyTorch."""
    if weight.ndim != 2:
        raise PartInferError(f"a weight to quantise must be [rows, columns], got {list(weight.shape)}")
    rows, columns = weight.shape
    check_column_weights(column_weights, columns)
    result, group = QuantizedTensor.empty(rows, columns, weight_format, weight.device), weight_format.group
    step = max(1, _VALUES_AT_ONCE // columns)
    important = None if column_weights is None else column_weights.to(weight.device).view(-1, group)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        groups = weight[piece].float().view(-1, columns // group, group)
        result.data[piece], result.scales[piece] = weight_format.quantize(groups, important)
    return result


def check_column_weights(column_weights: Tensor | None, columns: int) -> None:
    """Raise PartInferError unless column_weights is None or float32 [columns]."""
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
    return replace(weight, data=torch.stack([plane.flatten(1) for plane in planes]))


def join_planes(weight: QuantizedTensor) -> QuantizedTensor:
    """The same weight as int8 [rows, columns]."""
    high, low = weight.data.view(2, len(weight), -1, GROUP // 2)
    first, second = (high & 15) << 4 | low & 15, high & 0xF0 | low >> 4
    values = torch.stack([first, second], dim=2).flatten(1) ^ 128
    return replace(weight, data=values.view(torch.int8))


def dequantize(weight: QuantizedTensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """`kernels.dequantize` in PyTorch."""
    weight = join_planes(weight) if weight.in_planes else weight
    floats = weight.format.unpack(weight.data, weight.scales).view(weight.shape)
    floats = floats if weight.column_scales is None else floats * weight.column_scales
    return floats.to(dtype) if out is None else out.copy_(floats.to(dtype))


def column_scales(largest: Tensor) -> Tensor:
    """The column scales of a weight, from the largest |value| of each column: float32 [columns] each."""
    return torch.where(largest > 0, largest / COLUMN_RANGE, 1.0)
