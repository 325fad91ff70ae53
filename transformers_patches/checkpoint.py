"""Reading a Hugging Face checkpoint folder tensor by tensor, and counting the bytes that were read.

A safetensors handle or view that stays alive keeps the whole file mapped, and mapped pages count as memory, so each
read opens its file, copies what it needs, and closes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from transformers_patches.errors import PartInferError

CHUNK_BYTES = 8 * 2**20  # what one read maps at most, so that peak memory stays near the tensors that are kept


@dataclass(frozen=True)
class WeightedSum:
    """What is summed up over columns that are not kept: sum over i of weights[i] W[:, columns[i]], into out [H].

    columns: int64 [n]; weights, out: float32.
    """

    columns: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor


class WeightSource(Protocol):
    """Where weights come from, tensor by tensor. source: what to call it in messages; bytes_read: so far."""

    source: str
    bytes_read: int

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def total_bytes(self) -> int: ...

    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None: ...

    def read_columns_into(
        self, name: str, out: torch.Tensor, columns: torch.Tensor, rest: WeightedSum | None = None
    ) -> None: ...


class Checkpoint:
    """The tensors of a folder with model.safetensors, or shards and their index.

    bytes_read counts what was read from the files. Raises PartInferError for folders without such files and for
    damaged ones.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.source = str(folder)
        self.bytes_read = 0
        self._files = self._find_files()
        self._headers: dict[str, tuple[tuple[int, ...], int]] = {}
        self._places: dict[Path, tuple[int, dict]] = {}

    def _find_files(self) -> dict[str, Path]:
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.is_file():
            try:
                shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = {name: self.folder / shard for name, shard in shards.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PartInferError(f"{index} can't be read (truncated?): {error}; fetch the model again") from None
            missing = sorted({str(path) for path in files.values() if not path.is_file()})
            if missing:
                raise PartInferError(f"{index} names {missing[0]}, which is not there: fetch the model again")
            return files
        if single.is_file():
            with self._open(single) as file:
                return dict.fromkeys(file.keys(), single)
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
            raise PartInferError(f"{path} can't be read (truncated?): {error}; fetch the model again") from None

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header(name)[0]

    def nbytes(self, name: str) -> int:
        """Size of a tensor in the file."""
        return self._header(name)[1]

    def _header(self, name: str) -> tuple[tuple[int, ...], int]:
        """(shape, bytes) of a tensor; a file is opened once for all of its tensors."""
        if name not in self._headers:
            path = self._files[name]
            with self._open(path) as file:
                for stored in file.keys():  # noqa: SIM118
                    if self._files.get(stored) == path:
                        part = file.get_slice(stored)
                        shape = tuple(part.get_shape())
                        self._headers[stored] = (shape, _element_size(part.get_dtype()) * math.prod(shape))
            if name not in self._headers:
                raise PartInferError(f"{path} lacks {name}, which the index says it has: fetch the model again")
        return self._headers[name]

    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(self.nbytes(name) for name in self._files)

    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Copy a tensor, or some rows of it, into `out`, converted to its dtype and device.

        out: the tensor's shape, or [len(rows), …]; rows: int64 indices into dimension 0, checked by the caller.
        """
        if rows is None and self._read_directly(name, out):
            return
        if out.ndim == 0 or (rows is None and self.nbytes(name) <= CHUNK_BYTES):
            with self._open(self._files[name]) as file:
                out.copy_(file.get_tensor(name))
            self.bytes_read += self.nbytes(name)
            return
        row_bytes = max(1, self.nbytes(name) // self.shape(name)[0])
        step = max(1, CHUNK_BYTES // row_bytes)
        if rows is None:
            for start in range(0, len(out), step):
                with self._open(self._files[name]) as file:
                    out[start : start + step].copy_(file.get_slice(name)[start : start + step])
            self.bytes_read += self.nbytes(name)
            return
        order = rows.argsort()  # the file is read front to back
        for places in order.split(step):
            with self._open(self._files[name]) as file:
                # a view of the mapped file: only the pages of these rows are touched
                part = file.get_tensor(name).index_select(0, rows[places])
            out[places.to(out.device)] = part.to(out.device, out.dtype)
        self.bytes_read += row_bytes * len(rows)

    def _read_directly(self, name: str, out: torch.Tensor) -> bool:
        """Read a whole tensor from the file into `out` without mapping it; False if it has to be converted."""
        place = self._place(name)
        if (
            place is None
            or out.dtype != place[0]
            or out.device.type != "cpu"
            or not out.is_contiguous()
            or not out.numel()
        ):
            return False
        _, start, size = place
        view = memoryview(out.view(-1).view(torch.uint8).numpy())
        with open(self._files[name], "rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < size:
                read = file.readinto(view[done : done + CHUNK_BYTES])
                if not read:
                    raise PartInferError(f"{self._files[name]} can't be read (truncated?); fetch the model again")
                done += read
        self.bytes_read += size
        return True

    def _place(self, name: str) -> tuple[torch.dtype, int, int] | None:
        """(type, first byte in the file, bytes) of a tensor; None for a type that PyTorch has not."""
        path = self._files[name]
        if path not in self._places:
            with self._open(path), open(path, "rb") as file:  # safetensors checks the header first
                size = int.from_bytes(file.read(8), "little")
                self._places[path] = (8 + size, json.loads(file.read(size)))
        data, header = self._places[path]
        if name not in header or header[name]["dtype"] not in _DTYPES:
            return None
        first, last = header[name]["data_offsets"]
        return _DTYPES[header[name]["dtype"]], data + first, last - first

    def read_columns_into(
        self, name: str, out: torch.Tensor, columns: torch.Tensor, rest: WeightedSum | None = None
    ) -> None:
        """Copy columns of a [H, N] tensor, transposed, into out [len(columns), H]; sum up others as `rest` says.

        A row of the file is shorter than the gaps that could be skipped, so all of the tensor is read.
        """
        height = out.shape[1]
        step = max(1, CHUNK_BYTES // (self.nbytes(name) // height))
        for start in range(0, height, step):
            with self._open(self._files[name]) as file:
                block = file.get_slice(name)[start : start + step]
                part = block.index_select(1, columns)
                if rest is not None:
                    others = block.index_select(1, rest.columns).float()
                    rest.out[start : start + step] = others @ rest.weights
                del block  # it keeps the file mapped
            out[:, start : start + step] = part.t().to(out.device, out.dtype)
        self.bytes_read += self.nbytes(name)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def _element_size(dtype: str) -> int:
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    return sizes.get(dtype, 1)
