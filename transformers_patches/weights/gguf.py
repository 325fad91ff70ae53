"""The tensors of a GGUF file by their transformers names, unpacked row by row: a WeightSource."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from transformers_patches import kernels
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.weights.file_state import FilesInUse
from transformers_patches.weights.gguf_architectures import architecture_of
from transformers_patches.weights.gguf_config import config_of
from transformers_patches.weights.gguf_family import family_of
from transformers_patches.weights.gguf_file import GGUFFile, read_gguf
from transformers_patches.weights.gguf_places import Place, Stack, Turns, places_of_family, places_of_model
from transformers_patches.weights.gguf_schema import Metadata
from transformers_patches.weights.parts import rows_of_part, whole_name
from transformers_patches.weights.source import Source, WeightSource

VALUES_AT_ONCE = 2**21  # that are unpacked together; they are float32 for a moment


class GGUFCheckpoint(WeightSource):
    """The tensors of a GGUF file and its other parts, in any type that the gguf package unpacks (Q8_0, Q4_K, F16, …).

    Reads and unpacks only the rows that are asked for; nothing keeps the file mapped. bytes_read counts packed bytes.
    Raises PartInferError for damaged files and for architectures whose names are not known here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.source = str(path)
        self.bytes_read = 0
        file = read_gguf(self.path)
        self._in_use = FilesInUse()
        for tensor in file.tensors.values():
            self._in_use.add(tensor.path)
        self._tensors = _places(file)

    def names(self) -> set[str]:
        return set(self._tensors)

    def _place(self, name: str) -> Place | Turns | Stack:
        """Where a tensor is, or a part of one that the file has in one piece (`weights/parts.py`)."""
        place, rows = self._tensors.get(name), rows_of_part(name)
        if place is not None or rows is None:
            return self._tensors[name]
        whole = self._tensors[whole_name(name)]
        if isinstance(whole, Stack):
            for place, own in whole.ranges():
                if (own.start, own.stop) == (rows.start, rows.stop):
                    return place
        if (
            isinstance(whole, Turns | Stack)
            or whole.order is not None
            or len(whole.shape) != 2
            or not rows.start <= rows.stop <= whole.rows
        ):
            raise PartInferError(f"{self.path}: {name} was asked for, but its shape is {whole.shape}")
        count = rows.stop - rows.start
        offset, nbytes = whole.offset + rows.start * whole.row_bytes, count * whole.row_bytes
        return replace(whole, shape=(count, whole.columns), offset=offset, nbytes=nbytes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """What it is unpacked to."""
        return torch.float32

    def total_bytes(self) -> int:
        """Size of all tensors in the file, packed."""
        return sum(stored.nbytes for stored in self._tensors.values())

    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        stored = self._place(name)
        if isinstance(stored, Turns):
            self._read_turns(stored, out, rows)
        elif isinstance(stored, Stack):
            self._read_stack(stored, out, rows)
        else:
            self._read_place(stored, out, rows)

    def _read_place(self, stored: Place, out: torch.Tensor, rows: torch.Tensor | None) -> None:
        if stored.path is None:
            out.fill_(stored.add)
            return
        if len(stored.shape) == 1:
            values = self._unpack(stored, torch.zeros(1, dtype=torch.int64))[0]
            values = values if stored.order is None else values[stored.order(len(values))]
            out.copy_(values if rows is None else values[rows])
            return
        rows = torch.arange(stored.rows) if rows is None else rows
        places = rows if stored.order is None else stored.order(stored.rows)[rows]
        order = places.argsort()  # the file is read front to back
        for part in order.split(max(1, VALUES_AT_ONCE // stored.columns)):
            values = self._unpack(stored, places[part]).view(-1, *stored.shape[1:])
            out[part.to(out.device)] = values.to(out.device, out.dtype)

    def read_columns_into(self, source: Source, out: torch.Tensor) -> None:
        """Packed rows are whole, so all of the tensor is read."""
        stored, rest = self._place(source.name), source.left_out
        if isinstance(stored, Turns):
            self._read_columns_of_turns(stored, source.neurons, out)
            return
        for part in torch.arange(stored.rows).split(max(1, VALUES_AT_ONCE // stored.columns)):
            values = self._unpack(stored, part)
            if rest is not None:
                rest.out[part] = values.index_select(1, rest.columns) @ rest.weights
            if source.largest is not None:
                source.largest[part] = values.abs().amax(dim=1)
            out[:, part[0] : part[-1] + 1] = values.index_select(1, source.neurons).t().to(out.device, out.dtype)

    def _read_stack(self, stored: Stack, out: torch.Tensor, rows: torch.Tensor | None) -> None:
        rows = torch.arange(stored.shape[0]) if rows is None else rows
        for place, own in stored.ranges():
            mine = ((rows >= own.start) & (rows < own.stop)).nonzero().squeeze(1)
            values = torch.empty(len(mine), place.columns)
            self._read_place(place, values, rows[mine] - own.start)
            out[mine.to(out.device)] = values.to(out.device, out.dtype)

    def _read_turns(self, stored: Turns, out: torch.Tensor, rows: torch.Tensor | None) -> None:
        turns = len(stored.places)
        for turn, place in enumerate(stored.places):
            for part in torch.arange(place.rows).split(max(1, VALUES_AT_ONCE // place.columns)):
                values = self._unpack(place, part)
                if stored.turned:
                    columns = turns * part + turn
                    out[:, columns] = (values if rows is None else values[:, rows]).t().to(out.device, out.dtype)
                else:
                    out[part, turn::turns] = values.to(out.device, out.dtype)

    def _read_columns_of_turns(self, stored: Turns, columns: torch.Tensor, out: torch.Tensor) -> None:
        """Columns that are rows in the file: only those are read. Their rows have no scales of columns."""
        turns = len(stored.places)
        for turn, place in enumerate(stored.places):
            mine = (columns % turns == turn).nonzero().squeeze(1)
            if not len(mine):
                continue
            wanted = columns[mine] // turns
            order = wanted.argsort()
            for part in order.split(max(1, VALUES_AT_ONCE // place.columns)):
                out[mine[part]] = self._unpack(place, wanted[part]).to(out.device, out.dtype)

    def _unpack(self, stored: Place, rows: torch.Tensor) -> torch.Tensor:
        """float32 [len(rows), columns] of a tensor's rows as they lie in the file. rows: rising.

        The stretch from the first to the last row is read, not mapped: a file that is cut off meanwhile is an error.
        """
        first, last = int(rows[0]), int(rows[-1])
        packed = np.empty((last + 1 - first, stored.row_bytes), dtype=np.uint8)
        with _as_one_line(stored.path), open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.offset + first * stored.row_bytes)
            view, done = memoryview(packed).cast("B"), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise OSError("it ends too early")
                done += count
        if len(rows) < len(packed):
            packed = packed[rows.numpy() - first]
        self.bytes_read += packed.nbytes
        values = _unpacked(packed, stored.kind)
        values = values.neg_().log_() if stored.is_exponential else values
        if not all(math.isfinite(end) for end in values.aminmax()):
            raise PartInferError(
                f"{stored.path}: {stored.stored} has values that are not finite: the file is damaged, or the training was"
            )
        return values + stored.add if stored.add else values

    def fill(self, requests: Iterable[tuple[Source, torch.Tensor | QuantizedTensor]]) -> None:
        super().fill(requests)
        self._in_use.check_unchanged()


def _unpacked(packed: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor:
    """float32 [rows, columns] of packed rows, uint8 [rows, bytes]: by the kernels if they know the kind, else by NumPy."""
    values, nbytes = GGML_QUANT_SIZES[kind]  # of a block
    packed = np.ascontiguousarray(packed)
    known = kernels.unpack_blocks(torch.from_numpy(packed), kind.name, packed.shape[1] // nbytes * values)
    if known is not None:
        return known
    with np.errstate(all="ignore"):  # of scales that are not finite
        unpacked = dequantize(packed, kind)
    return torch.from_numpy(np.ascontiguousarray(unpacked, dtype=np.float32))


@contextmanager
def _as_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PartInferError(
            f"{path} can't be read (truncated?): {error.strerror or error}; fetch the model again"
        ) from None


def _places(file: GGUFFile) -> dict[str, Place]:
    metadata = Metadata(file)
    architecture = architecture_of(metadata)
    if architecture is None:
        return places_of_family(file, metadata, family_of(metadata))
    return places_of_model(file, metadata, architecture, config_of(file))
