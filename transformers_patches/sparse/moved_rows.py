"""MovedRows: rows that stay in CPU memory and are moved to the GPU for use, while the GPU computes (`--memory_limit`).

A prompt needs all rows of every layer, one layer after the other. So when a layer asks for its rows, the next layer's
begin to move, on a stream of their own, and two layers are on the GPU at a time. What a prompt has chosen is gathered
in page-locked memory, from which copies need no processor: while one layer's neurons move, the next ones are gathered.
"""

from __future__ import annotations

from typing import Protocol

import torch

from transformers_patches.kernels import QuantizedTensor, Weight
from transformers_patches.sparse.neuron_rows import NeuronRows, Rows


class Moving(Protocol):
    """Rows on their way to a device."""

    def take(self) -> Rows:
        """The rows, for what is computed from now on."""


class Copies(Protocol):
    """How rows get to a device."""

    def gather(self, weight: Weight, index: torch.Tensor) -> Weight:
        """A copy of some rows in CPU memory from which `start` can move them without the processor."""

    def start(self, rows: Rows) -> Moving:
        """Begin to move rows. They may not be changed until they have been taken and used."""


class CudaCopies:
    """Copies to a GPU on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None  # made at first use

    def gather(self, weight: Weight, index: torch.Tensor) -> Weight:
        return weight.index_select(0, index).pin_memory()

    def start(self, rows: Rows) -> _CudaMoving:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            moved = {name: weight.to(self.device, non_blocking=True) for name, weight in rows.items()}
            return _CudaMoving(moved, self._stream.record_event(), self.device)


class _CudaMoving:
    def __init__(self, rows: Rows, arrived: torch.cuda.Event, device: torch.device) -> None:
        self.rows, self.arrived, self.device = rows, arrived, device

    def take(self) -> Rows:
        """The stream that computes waits for the rows, and their memory is kept until it has used them."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.arrived)
        for weight in self.rows.values():
            for part in weight.parts if isinstance(weight, QuantizedTensor) else [weight]:
                part.record_stream(stream)
        return self.rows


class Transfers:
    """Moves the rows of a model's layers, in their order, ahead of their use."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self.layers: list[MovedRows] = []
        self._ahead: tuple[MovedRows, Moving] | None = None

    def all(self, rows: MovedRows) -> Rows:
        """All rows of a layer. The next layer's begin to move."""
        known = self._ahead is not None and self._ahead[0] is rows
        moving = self._ahead[1] if known else self.copies.start(rows.stored())
        following = self.layers.index(rows) + 1
        self._ahead = None  # rows that were not asked for: their pass was interrupted
        if following < len(self.layers):
            self._ahead = self.layers[following], self.copies.start(self.layers[following].stored())
        return moving.take()


class MovedRows(NeuronRows):
    """The loaded neurons of one layer, in CPU memory, for products on a GPU. `join` must be called once."""

    transfers: Transfers

    def join(self, transfers: Transfers) -> None:
        """Become the last of the layers whose rows these transfers move."""
        self.transfers = transfers
        transfers.layers.append(self)

    def stored(self) -> Rows:
        """All rows where they lie."""
        return {name: self.weight(name) for name in self.row_names}

    def all(self, device: torch.device) -> Rows:
        return self.transfers.all(self)

    def first(self, count: int, device: torch.device) -> Rows:
        return self.transfers.copies.start({name: weight[:count] for name, weight in self.stored().items()}).take()

    def gathered(self, index: torch.Tensor, device: torch.device) -> Rows:
        index, copies = index.cpu(), self.transfers.copies
        return copies.start({name: copies.gather(weight, index) for name, weight in self.stored().items()}).take()
