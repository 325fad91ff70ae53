"""WeightSource: where weights come from, tensor by tensor, and what loading asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from transformers_patches import kernels
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.kernels.quantization import column_scales
from transformers_patches.neurons.fit_file import LayerFit
from transformers_patches.weights.by_row import RowsInFile
from transformers_patches.weights.parallel_reads import scratch

QUANTIZED_AT_ONCE = 2**21  # values; bounds the floats in memory while a weight is quantised


@dataclass(frozen=True)
class WeightedSum:
    """A weighted sum of columns that are not kept: the sum over i of weights[i] W[:, columns[i]].

    columns: int64 [n], which columns.
    weights: float32 [n], what each is multiplied with.
    out: float32 [H], where the sum goes.
    """

    columns: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor


@dataclass(frozen=True)
class Source:
    """Where a weight of the model comes from: a tensor of the source, and which part of it is read.

    name: the tensor's.
    how: "whole", "rows" or "columns". Columns become the rows of the weight.
    neurons: int64 [L], which rows or columns; None for the whole tensor.
    left_out: a sum of the other columns that is wanted as well.
    fit: how the columns are changed after reading.
    column_weights: float32 [columns], how much errors in each column count when rows are quantised.
    size: how many rows or columns there are, wanted or not; None: as many as the plan's layers have neurons.
    largest: float32 [H], to be filled with the largest size in each row of a tensor whose columns are read. All columns
        count, not only those that are wanted.
    """

    name: str
    how: str = "whole"
    neurons: torch.Tensor | None = None
    left_out: WeightedSum | None = None
    fit: LayerFit | None = None
    column_weights: torch.Tensor | None = None
    size: int | None = None
    largest: torch.Tensor | None = None

    @classmethod
    def by_input(cls, name: str, inputs: int) -> Source:
        """All columns of a linear layer's weight, as the rows of one that is stored by input."""
        return cls(name, "columns", torch.arange(inputs), size=inputs)


class WeightSource(ABC):
    """The tensors of a model.

    source: its name in messages.
    bytes_read: how many bytes were asked for so far.
    """

    source: str
    bytes_read: int

    @abstractmethod
    def names(self) -> set[str]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """A float type that holds the tensor as it is."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Size of all tensors."""

    @abstractmethod
    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Copy a tensor, or some rows of it, into `out`, converted to its dtype and device.

        out: the tensor's shape, or [len(rows), …].
        rows: int64 indices into dimension 0, checked by the caller.
        """

    @abstractmethod
    def read_columns_into(self, source: Source, out: torch.Tensor) -> None:
        """Copy a source's columns of a [H, N] tensor, transposed, into out [len(neurons), H].

        Fills the source's `left_out` and `largest` as well.
        """

    def same(self, one: str, other: str) -> bool:
        """Whether two stored matrices hold the same values. Reads them, up to the first difference."""
        shape = self.shape(one)
        if shape != self.shape(other) or len(shape) != 2:
            return False
        step = max(1, QUANTIZED_AT_ONCE // max(1, shape[1]))
        for start in range(0, shape[0], step):
            rows = torch.arange(start, min(start + step, shape[0]))
            values = [torch.empty(len(rows), shape[1]) for _ in range(2)]
            for name, out in zip((one, other), values, strict=True):
                self.read_into(name, out, rows)
            if not torch.equal(*values):
                return False
        return True

    def mapped(
        self, source: Source, like: torch.Tensor | QuantizedTensor, *, paired: bool
    ) -> torch.Tensor | QuantizedTensor | None:
        """A weight in the memory where its file is mapped; fill() reads its pages. None if it has to be copied.

        like: a weight of the same shape and type. paired: whether its rows are to be interleaved with another's, as by
        WeightMemory.empty_paired.
        """
        return None

    def by_row(
        self, source: Source, like: torch.Tensor | QuantizedTensor, rows: RowsInFile
    ) -> torch.Tensor | QuantizedTensor | None:
        """A whole weight that stays in its file, where tokens read a few rows of it; None if it can't.

        like: a weight of the same shape and type. Of one in planes only the low plane stays in the file. rows: what
        keeps it.
        """
        return None

    def fill(self, requests: Iterable[tuple[Source, torch.Tensor | QuantizedTensor]]) -> None:
        """Read weights one after the other, and quantise those that go into quantised memory.

        At any time, at most the columns of one tensor, or a few rows, are in memory as floats.
        """
        for source, out in requests:
            if isinstance(out, QuantizedTensor):
                self._quantize(source, out)
            else:
                self._read(source, out)

    def _read(self, source: Source, out: torch.Tensor) -> None:
        if takes_whole_rows(source):
            put_fitted(source.fit, out)
        elif source.how == "columns":
            self.read_columns_into(source, out)
            if source.fit is not None:
                put_fitted(source.fit, out, out)
        else:
            self.read_into(source.name, out, source.neurons)

    def _quantize(self, source: Source, out: QuantizedTensor) -> None:
        if takes_whole_rows(source):
            put_fitted(source.fit, out)
        elif source.how == "columns":
            values, largest = scratch(out.shape, self.dtype(source.name)), torch.empty(out.shape[1])
            self.read_columns_into(replace(source, largest=largest), values)
            put_fitted(source.fit, out, values, largest)
        else:
            rows = torch.arange(len(out)) if source.neurons is None else source.neurons
            for piece in pieces(out):
                values = torch.empty(len(rows[piece]), out.shape[1])
                self.read_into(source.name, values, rows[piece])
                put(out, piece, values, source.column_weights)


def takes_whole_rows(source: Source) -> bool:
    """Whether the fit file has the rows itself, so that nothing is read."""
    return source.fit is not None and source.fit.down is not None


def put_fitted(
    fit: LayerFit | None,
    out: torch.Tensor | QuantizedTensor,
    down: torch.Tensor | None = None,
    largest: torch.Tensor | None = None,
) -> None:
    """Put down rows [L, H], changed as a fit says, into `out`, which may be `down` itself.

    down: None if the fit has its own rows. These are dropped afterwards: layer by layer, memory moves from the fit to
        the model.
    largest: float32 [H], the largest size in each column over the rows of all neurons, from which column scales are
        made; None: over these rows only.
    """
    if isinstance(out, QuantizedTensor) and out.column_scales is not None:
        rows = down if fit is None or fit.down is None else fit.down
        largest = largest_in_columns(rows) if largest is None else largest
        out.column_scales.copy_(column_scales(largest.to(out.device)))
    if fit is None or fit.down is not None:
        down = down if fit is None else fit.down
        for piece in pieces(out):
            put(out, piece, down[piece])
        if fit is not None:
            fit.down = None
        return
    quantized = isinstance(out, QuantizedTensor)  # then in float32, so that values are rounded only once
    for piece in pieces(out):
        put(out, piece, fit.refitted(down[piece].float() if quantized else down[piece], piece))


def largest_in_columns(rows: torch.Tensor) -> torch.Tensor:
    """The largest absolute value in each column of rows [n, H]: float32 [H]."""
    rows = rows.float() if rows.dtype.itemsize == 1 else rows
    lowest, highest = rows.aminmax(dim=0)
    return torch.maximum(-lowest, highest).float()


def pieces(out: torch.Tensor | QuantizedTensor) -> list[slice]:
    """Slices that together cover all rows, QUANTIZED_AT_ONCE values each."""
    step = max(1, QUANTIZED_AT_ONCE // out.shape[1])
    return [slice(start, min(start + step, len(out))) for start in range(0, len(out), step)]


def put(
    out: torch.Tensor | QuantizedTensor,
    places: slice | torch.Tensor,
    values: torch.Tensor,
    column_weights: torch.Tensor | None = None,
) -> None:
    """Write rows to some places of `out`, converted to its type and device.

    They are quantised, with column_weights, if `out` is.
    """
    if isinstance(places, torch.Tensor):
        places = places.to(out.device)
    if isinstance(out, QuantizedTensor):
        exact = values if values.dtype in (torch.float32, torch.bfloat16, torch.float16) else values.float()
        packed = kernels.quantize(exact.to(out.device), out.format, column_weights, out.column_scales)
        out.put(places, kernels.split_planes(packed) if out.in_planes else packed)
    else:
        out[places] = values.to(out.device, out.dtype)
