"""What the kernels take: named groups of tensors and numbers. T tokens, n positions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from transformers_patches.kernels.quantization import QuantizedTensor, Weight


class Matrix(NamedTuple):
    """A weight [rows, columns] whose rows are contiguous; they may lie apart."""

    data: Tensor
    scales: Tensor | None  # float16 [rows, columns / 32], of quantised weights
    columns: int
    row_stride: int  # of data, in elements
    scale_stride: int
    bias: Tensor | None  # [rows]

    @classmethod
    def of(cls, weight: Weight, bias: Tensor | None = None) -> Matrix:
        """Column scales are not part of it: they belong to a sum of rows, once."""
        columns = weight.shape[1]
        if isinstance(weight, QuantizedTensor):
            return cls(weight.data, weight.scales, columns, weight.data.stride(0), weight.scales.stride(0), bias)
        return cls(weight, None, columns, weight.stride(0), 0, bias)


class Positions(NamedTuple):
    """Which rows of a weight count: position i is row i below `prefix`, and row index[i - prefix] from there on.

    chosen, counts: with them token t has the positions chosen[t, :counts[t]] only.
    """

    count: int  # positions that there are
    prefix: int
    index: Tensor | None  # int32
    chosen: Tensor | None  # int32 [T, count]
    counts: Tensor | None  # int32 [T]


class Finish(NamedTuple):
    """What becomes of a product: it is activated, multiplied, scored, and may be set to 0.

    All that is [T, count] is by position.
    """

    times: Tensor | None  # float32 [T, count], what the activated product is multiplied by
    size: Tensor | None  # float32 [rows], for scores |result| size
    scores: Tensor | None  # float32 [T, count], where scores go
    down_size: Tensor | None  # float32 [rows]
    down_threshold: float  # results with |result| down_size not above this become 0
