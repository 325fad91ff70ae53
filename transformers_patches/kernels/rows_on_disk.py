"""Rows of gate and down of which some are in memory, and the others are read when a token has chosen them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

THREADS = 6  # that read at once: a solid-state disk is idle most of the time with one
GAP = 32 * 1024  # bytes between rows that are read rather than skipped: with fewer, another read takes longer
UNIT = 64  # bytes, of which a record is a multiple, and its place in the file


@dataclass(frozen=True)
class RecordPlace:
    """Where the records of a layer's neurons are.

    path: the file.
    start: the first byte.
    rows: how many there are.
    slots: how many of them memory has room for.
    """

    path: Path
    start: int
    rows: int
    slots: int


@dataclass(frozen=True)
class FetchCounts:
    """What tokens have asked for.

    chosen: rows that tokens have chosen.
    found: those of them that were in memory.
    bytes_read: from disk, with those between chosen rows, and what prompts were streamed for.
    reads: how many reads that took.
    """

    chosen: int
    found: int
    bytes_read: int
    reads: int


class RowsOnDisk:
    """The records of all layers: a neuron's row of gate, its row of down, and the scales of both.

    Memory has room for some of each layer's records, at first its first ones, later those that were chosen often and
    lately. One more layer's records have room for the token that is computed. Needs the native kernels. Raises ValueError
    if a file can't be read.
    """

    def __init__(self, record: int, places: list[RecordPlace], *, threads: int = THREADS, gap: int = GAP) -> None:
        """record: bytes of a record, a multiple of UNIT. gap: bytes between rows that are read rather than skipped."""
        paths = list(dict.fromkeys(str(place.path) for place in places))
        self.native = torch.classes.partinfer.RowsOnDisk(paths, record, threads, gap)
        for place in places:
            self.native.add_layer(paths.index(str(place.path)), place.start, place.rows, place.slots)
        self.native.load()

    def view(self, layer: int) -> Tensor:
        """Where `fetch` puts a layer's records: uint8 [rows, record]. All layers, and tokens, use the same memory."""
        return self.native.view(layer)

    def fetch(self, layer: int) -> None:
        """Read all records of a layer."""
        self.native.fetch(layer)

    def take_counts(self) -> FetchCounts:
        """What was asked for since this was last called."""
        return FetchCounts(*self.native.take_counts().tolist())

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of memory for records."""
        return self.native.bytes_in_memory()
