"""Reading a Hugging Face checkpoint folder tensor by tensor, and counting the bytes that were read.

Files are not mapped: a safetensors handle or view that stays alive keeps the whole file mapped, and mapped pages count
as memory. (Packs can be mapped, because they hold only what is needed.) Instead, several threads read blocks of a file,
straight into their place if nothing has to be selected or converted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from transformers_patches.errors import PartInferError
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.weights import parallel_reads
from transformers_patches.weights.by_row import RowsInFile
from transformers_patches.weights.config_file import one_line
from transformers_patches.weights.file_kinds import is_safetensors, what_it_is
from transformers_patches.weights.file_state import FilesInUse
from transformers_patches.weights.parallel_reads import BLOCK_BYTES, MAPPED_BLOCK_BYTES, Read, after_all, scratch
from transformers_patches.weights.parts import rows_of_part, whole_name
from transformers_patches.weights.source import (
    Source,
    WeightSource,
    largest_in_columns,
    put,
    put_fitted,
    takes_whole_rows,
)


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored.

    path: its file.
    start: its first byte there.
    nbytes: its size in bytes.
    dtype: its type.
    shape: its shape.
    """

    path: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(1, self.rows)

    def part(self, rows: slice) -> Place:
        """Where some of the rows are stored; a tensor of three dimensions counts as one matrix after the other."""
        of_all = self.flat
        count, start = rows.stop - rows.start, self.start + rows.start * of_all.row_bytes
        return replace(of_all, start=start, nbytes=count * of_all.row_bytes, shape=(count, *of_all.shape[1:]))

    @property
    def flat(self) -> Place:
        """The same without the first of three dimensions."""
        if len(self.shape) != 3:
            return self
        return replace(self, shape=(self.shape[0] * self.shape[1], self.shape[2]))

    def floats(self, name: str) -> tuple[str, torch.dtype] | None:
        """The tensor's name and type for a Read, if it has floats."""
        return (name, self.dtype) if self.dtype.is_floating_point else None


class Checkpoint(WeightSource):
    """The tensors of a folder with model.safetensors, or shards and their index.

    bytes_read counts the rows that were asked for, and the whole tensor if columns were. Raises PartInferError for
    folders without such files, and for damaged files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.source = str(folder)
        self.bytes_read = 0
        self._files = self._find_files()
        self._headers: dict[Path, dict[str, Place]] = {}
        self._in_use = FilesInUse()

    def _find_files(self) -> dict[str, Path]:
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if single.is_file():  # transformers, too, does not look at shards beside it
            with self._open(single) as file:
                return dict.fromkeys(file.keys(), single)
        if index.is_file():
            try:
                shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                if not all(0 < len(shard) < 256 and shard.isprintable() for shard in shards.values()):
                    raise ValueError("weight_map has values that are no names of files")
                files = {name: self.folder / shard for name, shard in shards.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise PartInferError(
                    f"{index} can't be read (truncated?): {one_line(error)}; fetch the model again"
                ) from None
            missing = sorted({str(path) for path in files.values() if not path.is_file()})
            if missing:
                raise PartInferError(f"{index} names {missing[0]}, which is not there: fetch the model again")
            return files
        if list(self.folder.glob("pytorch_model*.bin")):
            raise PartInferError(
                f"{self.folder} has only pytorch_model*.bin: python download.py converts such models to safetensors"
            )
        raise PartInferError(f"{self.folder} has no model.safetensors: fetch a model with python download.py")

    @contextmanager
    def _open(self, path: Path) -> Iterator:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            what = what_it_is(path)
            if what is not None and not is_safetensors(path):
                raise PartInferError(f"{path} is {what}") from None
            raise PartInferError(
                f"{path} can't be read (truncated?): {one_line(error)}; fetch the model again"
            ) from None

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._place(name).dtype

    def first_float_type(self) -> torch.dtype | None:
        """The type of the first file's first float tensor by name, which transformers takes where a config names none."""
        first = min(self._files.values(), default=None)
        names = sorted(name for name, path in self._files.items() if path == first)
        return next((dtype for name in names if (dtype := self._place(name).dtype).is_floating_point), None)

    def nbytes(self, name: str) -> int:
        """Size of a tensor in the file."""
        return self._place(name).nbytes

    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(self.nbytes(name) for name in self._files)

    def _place(self, name: str) -> Place:
        rows = None if name in self._files else rows_of_part(name)
        if rows is not None:
            whole = self._place(whole_name(name))
            if not whole.shape or rows.stop > whole.flat.rows:
                raise PartInferError(f"{self.source}: {name} was asked for, but its shape is {whole.shape}")
            return whole.part(rows)
        path = self._files[name]
        if path not in self._headers:
            self._headers[path] = self._read_header(path)
        if name not in self._headers[path]:
            raise PartInferError(f"{path} lacks {name}, which the index says it has: fetch the model again")
        return self._headers[path][name]

    def _read_header(self, path: Path) -> dict[str, Place]:
        self._in_use.add(path)
        with self._open(path), open(path, "rb") as file:  # safetensors checks the header first
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        places = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise PartInferError(f"{path} has {name} in {entry['dtype']}: PyTorch has no such type")
            first, last = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            places[name] = Place(path, 8 + size + first, last - first, dtype, shape)
        return places

    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        self.fill([(Source(name, "whole" if rows is None else "rows", rows), out)])

    def read_columns_into(self, source: Source, out: torch.Tensor) -> None:
        self.fill([(replace(source, how="columns", fit=None), out)])

    def fill(self, requests: Iterable[tuple[Source, torch.Tensor | QuantizedTensor]]) -> None:
        """As WeightSource.fill, but the next tensors are read while one is being worked on.

        Raises PartInferError for integers where floats are wanted, and if a file changes meanwhile.
        """
        parallel_reads.run(read for source, out in requests for read in self._reads(source, out))
        self._in_use.check_unchanged()

    def by_row(
        self, source: Source, like: torch.Tensor | QuantizedTensor, rows: RowsInFile
    ) -> torch.Tensor | QuantizedTensor | None:
        if source.how != "whole" or isinstance(like, QuantizedTensor):
            return None
        return self._left_in_file(source.name, like, rows)

    def _left_in_file(self, name: str, like: torch.Tensor, rows: RowsInFile, *, held: int = 0) -> torch.Tensor | None:
        """A stored tensor where its file is mapped, but for the first `held` bytes; None if it isn't like this."""
        place = self._place(name)
        if (place.dtype, place.shape) != (like.dtype, tuple(like.shape)) or place.start % place.dtype.itemsize:
            return None
        values = rows.tensor(place.path, place.start, place.nbytes, held=held)
        if values is None:
            return None
        self.bytes_read += held
        return values.view(place.dtype).view(place.shape)

    def _reads(self, source: Source, out: torch.Tensor | QuantizedTensor) -> Iterator[Read]:
        """The reads that a request needs, each with what is done with its bytes."""
        if takes_whole_rows(source):
            put_fitted(source.fit, out)
        elif source.how == "columns":
            yield from self._column_reads(source, out)
        else:
            yield from self._row_reads(source.name, out, source.neurons, source.column_weights)

    def _row_reads(
        self,
        name: str,
        out: torch.Tensor | QuantizedTensor,
        rows: torch.Tensor | slice | None = None,
        column_weights: torch.Tensor | None = None,
    ) -> Iterator[Read]:
        """The reads of some rows: None for all, a slice, or int64 indices, which are read in the order of the file."""
        place = self._place(name)
        _check_type(name, place, out)
        if not place.nbytes:
            return
        order = None
        if isinstance(rows, torch.Tensor):
            rows, order = rows.sort()
        first, count = (0, place.rows) if rows is None or order is not None else (rows.start, rows.stop - rows.start)
        self.bytes_read += place.row_bytes * (count if order is None else len(order))
        if order is None and _holds_bytes_of(out, place):
            memory, mapped = out.view(-1).view(torch.uint8), self._is_mapped(out)
            step = MAPPED_BLOCK_BYTES if mapped else max(1, BLOCK_BYTES // out.itemsize) * out.itemsize
            for start in range(0, len(memory), step):
                part = memory[start : start + step]
                yield Read(
                    place.path,
                    place.start + first * place.row_bytes + start,
                    len(part),
                    part,
                    mapped,
                    place.floats(name),
                )
            return
        step = max(1, BLOCK_BYTES // place.row_bytes)
        for start in range(first, first + count, step):
            stop = min(start + step, first + count)
            if order is None:
                take = partial(_take_rows, place, out, column_weights, slice(start - first, stop - first), None)
            else:
                low, high = torch.searchsorted(rows, torch.tensor([start, stop])).tolist()
                if low == high:
                    continue
                start, stop = int(rows[low]), int(rows[high - 1]) + 1
                take = partial(_take_rows, place, out, column_weights, order[low:high], rows[low:high] - start)
            size = (stop - start) * place.row_bytes
            yield Read(place.path, place.start + start * place.row_bytes, size, floats=place.floats(name), take=take)

    def _is_mapped(self, out: torch.Tensor) -> bool:
        """Whether memory is the mapping of the file itself, so that nothing has to be copied."""
        return False

    def _column_reads(self, source: Source, out: torch.Tensor | QuantizedTensor) -> Iterator[Read]:
        """Reads the whole tensor: the wanted parts of a row are too close together to skip what lies between them."""
        place, held = self._place(source.name), out
        _check_type(source.name, place, out)
        if isinstance(out, QuantizedTensor):
            held = scratch(out.shape, place.dtype)
            source = replace(source, largest=torch.empty(out.shape[1]))
        step = max(1, BLOCK_BYTES // place.row_bytes)
        for start in range(0, place.rows, step):
            stop = min(start + step, place.rows)
            take = partial(_take_columns, place, held, slice(start, stop), source)
            size, floats = (stop - start) * place.row_bytes, place.floats(source.name)
            yield Read(place.path, place.start + start * place.row_bytes, size, floats=floats, take=take)
        self.bytes_read += place.nbytes
        if held is not out or source.fit is not None:
            yield after_all(lambda: put_fitted(source.fit, out, held, source.largest))


def _check_type(name: str, place: Place, out: torch.Tensor | QuantizedTensor) -> None:
    """Raise PartInferError for integers where the model computes with floats: they are codes of somebody's quantisation.

    Integers into integers are this project's own, in packs.
    """
    floats = isinstance(out, QuantizedTensor) or out.dtype.is_floating_point
    if floats and not place.dtype.is_floating_point:
        raise PartInferError(
            f"{place.path}: {name} holds {str(place.dtype).removeprefix('torch.')}, expected floats (quantised by another "
            "program?): give the model as it was before that"
        )


def _holds_bytes_of(out: torch.Tensor | QuantizedTensor, place: Place) -> bool:
    """Whether bytes of the file can be read into `out` as they are."""
    return (
        isinstance(out, torch.Tensor) and out.dtype == place.dtype and out.device.type == "cpu" and out.is_contiguous()
    )


def _take_rows(
    place: Place,
    out: torch.Tensor | QuantizedTensor,
    column_weights: torch.Tensor | None,
    places: slice | torch.Tensor,
    chosen: torch.Tensor | None,
    block: torch.Tensor,
) -> None:
    """Put the rows of a block, or those of them that are chosen, into their places."""
    values = block.view(place.dtype).view(-1, *place.shape[1:])
    values = values if chosen is None else values.index_select(0, chosen)
    put(out if place.shape else out.view(1), places, values, column_weights)


def _take_columns(place: Place, out: torch.Tensor, rows: slice, source: Source, block: torch.Tensor) -> None:
    # transposed first: selecting rows of a contiguous matrix is several times as fast as selecting columns
    values = block.view(place.dtype).view(-1, place.shape[1]).t().contiguous()
    if source.left_out is not None:
        others = values.index_select(0, source.left_out.columns).float()
        source.left_out.out[rows] = source.left_out.weights @ others
    if source.largest is not None:
        source.largest[rows] = largest_in_columns(values)
    out[:, rows] = values.index_select(0, source.neurons).to(out.device, out.dtype)


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
