"""Weight formats: the ways to hold a weight in few bits. `--dtype` takes their names.

Another format is one more object in FORMATS, its name in config.py, and a native kernel if it is to be fast: without
one PyTorch turns its weights into floats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_patches.errors import PartInferError

GROUP = 32  # columns that share a scale, in all formats that the native kernels know


@dataclass(frozen=True)
class NativeKernel:
    """What the native kernels know about a format.

    code: what their operations call it, their argument `bits`.
    few_tokens: up to how many tokens they multiply faster than PyTorch does with unpacked weights (docs/speed.md).
    few_tokens_over_float32: the same where PyTorch has no fast products of 16 bits.
    """

    code: int
    few_tokens: int
    few_tokens_over_float32: int


@dataclass(frozen=True)
class WeightFormat(ABC):
    """How a [rows, columns] weight is held in few bits, every row on its own.

    A weight consists of two tensors, whose rows are its rows: `data`, the packed values, and `scales`
    [rows, columns / group, …], what turns values into floats.

    name: what `--dtype` and packs call it.
    bits: of one value.
    group: how many columns share a scale.
    native: what the native kernels know about it; None if they can't read it.
    splits: whether its data can also lie in two planes of four bits, as screening reads them (`kernels.split_planes`).
    """

    name: str
    bits: int
    group: int = GROUP
    native: NativeKernel | None = None
    splits: bool = False

    @abstractmethod
    def empty(self, rows: int, columns: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Memory for the data and scales of a weight."""

    @abstractmethod
    def quantize(self, groups: Tensor, column_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """The data and scales of some rows, float32 [rows, columns / group, group].

        column_weights: float32 [columns / group, group], how much the errors of each column count; None: all the same.
        """

    @abstractmethod
    def unpack(self, data: Tensor, scales: Tensor) -> Tensor:
        """The rows that data and scales stand for: float32 [rows, columns / group, group]."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row, data and scales."""
        return sum(part.nbytes for part in self.empty(1, columns, "meta"))


@dataclass(frozen=True)
class SymmetricFormat(WeightFormat):
    """Integers times one float16 scale per group: weight = scale * value.

    lowest: the smallest integer.
    highest: the largest integer.
    factors: times the scale that makes a group's largest value exact; a search for the scale with the least square
        error tries them all.
    favours_large: whether every scale is searched for, and errors are weighted with |weight|: with few bits large
        values, of which there are few, count most, in the error and in what a layer computes. Without, a scale is
        searched for only if there are column weights.
    """

    lowest: int = 0
    highest: int = 0
    factors: tuple[float, ...] = ()
    favours_large: bool = False

    @abstractmethod
    def exact_scale(self, groups: Tensor) -> Tensor:
        """float16 scales [rows, groups] that make each group's largest value exact."""

    @abstractmethod
    def pack(self, values: Tensor) -> Tensor:
        """The data of whole numbers, float32 [rows, groups, group]."""

    @abstractmethod
    def values(self, data: Tensor, groups: int) -> Tensor:
        """The numbers that `pack` packed, int8 [rows, groups, group]."""

    def quantize(self, groups: Tensor, column_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        scales = self.exact_scale(groups)
        if self.favours_large or column_weights is not None:
            scales = self._best_scale(groups, scales, column_weights)
        return self.pack(self._round(groups, scales)), scales

    def unpack(self, data: Tensor, scales: Tensor) -> Tensor:
        return self.values(data, scales.shape[1]) * scales.float().unsqueeze(-1)

    def _round(self, groups: Tensor, scales: Tensor) -> Tensor:
        scales = scales.float().unsqueeze(-1)
        values = groups * torch.where(scales == 0, 0.0, 1 / scales)
        return values.clamp_(self.lowest, self.highest).round_()

    def _best_scale(self, groups: Tensor, exact: Tensor, column_weights: Tensor | None) -> Tensor:
        importance = groups.abs() if self.favours_large else torch.ones_like(groups)
        importance = importance if column_weights is None else importance * column_weights
        best, least = exact, torch.full_like(exact, torch.inf, dtype=torch.float32)
        for factor in self.factors:
            candidate = (exact.float() * factor).half()
            restored = self._round(groups, candidate) * candidate.float().unsqueeze(-1)
            error = ((groups - restored).square_() * importance).sum(-1)
            better = error < least
            best, least = torch.where(better, candidate, best), torch.where(better, error, least)
        return best


class _Int8(SymmetricFormat):
    """data: int8 [rows, columns].

    In planes it is uint8 [2, rows, columns / 2], in the layout of Int4: value + 128 = 16 high + low.
    """

    def empty(self, rows: int, columns: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        return torch.empty(rows, columns, dtype=torch.int8, device=device), _empty_scales(rows, columns, device)

    def exact_scale(self, groups: Tensor) -> Tensor:
        return (groups.abs().amax(-1) / 127).half()

    def pack(self, values: Tensor) -> Tensor:
        return values.to(torch.int8).flatten(1)

    def values(self, data: Tensor, groups: int) -> Tensor:
        return data.view(len(data), groups, GROUP)


class _Int4(SymmetricFormat):
    """data: uint8 [rows, columns / 2]: value + 8 in four bits. Byte k of a group's 16 holds column k (its low bits) and
    column k + 16 (its high bits)."""

    def empty(self, rows: int, columns: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        return torch.empty(rows, columns // 2, dtype=torch.uint8, device=device), _empty_scales(rows, columns, device)

    def exact_scale(self, groups: Tensor) -> Tensor:
        """As -8, so a scale may be negative."""
        lowest, highest = groups.aminmax(dim=-1)
        return (torch.where(highest > -lowest, highest, lowest) / -8).half()

    def pack(self, values: Tensor) -> Tensor:
        nibbles = (values + 8).to(torch.uint8)
        return (nibbles[..., : GROUP // 2] | nibbles[..., GROUP // 2 :] << 4).flatten(1)

    def values(self, data: Tensor, groups: int) -> Tensor:
        packed = data.view(len(data), groups, GROUP // 2)
        return torch.cat((packed & 15, packed >> 4), dim=-1).to(torch.int8) - 8


def _empty_scales(rows: int, columns: int, device: torch.device | str) -> Tensor:
    return torch.empty(rows, columns // GROUP, dtype=torch.float16, device=device)


INT8 = _Int8(
    name="int8",
    bits=8,
    native=NativeKernel(code=8, few_tokens=32, few_tokens_over_float32=48),
    splits=True,
    lowest=-127,
    highest=127,
    factors=tuple(0.992 + 0.008 * step for step in range(9)),
)
INT4 = _Int4(
    name="int4",
    bits=4,
    native=NativeKernel(code=4, few_tokens=32, few_tokens_over_float32=128),
    lowest=-8,
    highest=7,
    factors=tuple(0.8 + 0.02 * step for step in range(13)),
    favours_large=True,
)
FORMATS: dict[str, WeightFormat] = {known.name: known for known in (INT8, INT4)}


def format_named(name: str) -> WeightFormat:
    """The format of a name; PartInferError if there is none."""
    if name not in FORMATS:
        raise PartInferError(f"a weight format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]
