"""The header of a GGUF file: metadata and tensor places, checked against the file's size before anything is built.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llama.cpp refuses is refused here, too:
big-endian files, version 1, arrays of arrays, tensors that leave gaps or overlap.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from transformers_patches.errors import PartInferError
from transformers_patches.weights.file_kinds import MAGIC, what_it_is

VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
ALIGNMENT = 32
PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.gguf)$", re.IGNORECASE)
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_SMALLEST_PAIR, _SMALLEST_TENSOR = 13, 33  # bytes of a key-value pair and of a tensor's description, at least


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path  # the file
    name: str  # as the file has it
    shape: tuple[int, ...]  # as PyTorch has it
    kind: GGMLQuantizationType  # how its values are packed
    offset: int  # the first byte of its packed values in the file
    nbytes: int  # bytes of its packed values


@dataclass(frozen=True)
class GGUFFile:
    """What the header of a GGUF file says, of all its parts."""

    path: Path  # the first part
    metadata: dict[str, Any]  # by key: bool, int, float, str, list of str, or NumPy array
    tensors: dict[str, StoredTensor]  # by name


def read_gguf(path: str | Path) -> GGUFFile:
    """The header of a GGUF file and of its other parts, if it is the first of several.

    Raises PartInferError, one line with the file's name, if there is no file, or it is damaged, cut, or of a kind that
    can't be read. Nothing of the tensors' values is read.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError:
        raise PartInferError(f"no model at {path}: fetch one with python download.py") from None
    if not path.is_file():
        raise PartInferError(f"{path} is no file: give a GGUF file")
    return _read_all(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=2)
def _read_all(path: Path, size: int, changed: int, inode: int) -> GGUFFile:
    first = _read_part(path)
    count, number = (_split(path, first.metadata, key) for key in ("split.count", "split.no"))
    if count < 2:
        return first
    match = PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise PartInferError(f"{path} is one of {count} parts: name them NAME-00001-of-{count:05d}.gguf and so on")
    names = [f"{match['stem']}-{part:05d}-of-{count:05d}{match['ending']}" for part in range(1, count + 1)]
    if number != 0 or path.name != names[0]:
        raise PartInferError(f"{path} is part {number + 1} of {count}: give the first one, {names[0]}")
    tensors = dict(first.tensors)
    for place, name in enumerate(names[1:], start=1):
        part_path = path.with_name(name)
        if not part_path.is_file():
            raise PartInferError(f"{path} is the first of {count} parts, but {name} is not there: fetch it too")
        part = _read_part(part_path)
        if (_split(part_path, part.metadata, "split.no"), _split(part_path, part.metadata, "split.count")) != (
            place,
            count,
        ):
            raise PartInferError(f"{part_path} is not part {place + 1} of {count} as its name says: fetch it again")
        if shared := tensors.keys() & part.tensors.keys():
            raise PartInferError(
                f"{part_path} has {min(shared)}, which an earlier part has, too: fetch the parts again"
            )
        tensors |= part.tensors
    total = first.metadata.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise PartInferError(
            f"{path} and its parts have {len(tensors)} tensors, but {total} are named: fetch them again"
        )
    return GGUFFile(path, first.metadata, tensors)


def _split(path: Path, metadata: dict[str, Any], key: str) -> int:
    value = metadata.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 100_000:
        raise PartInferError(f"{path} is damaged: {key} must be a number of parts, got {str(value)[:40]!r}")
    return value


def _read_part(path: Path) -> GGUFFile:
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                kind = what_it_is(path) or f"it starts with other bytes than {MAGIC.decode()}"
                raise PartInferError(f"{path} can't be read as GGUF: {kind}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
    except OSError as error:
        raise PartInferError(f"{path} can't be read: {error.strerror or error}") from None


class _Header:
    """Reads a header front to back; every length is compared with what is left of the file before it is used."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.place = path, data, len(data), len(MAGIC)

    def damaged(self, what: str) -> PartInferError:
        return PartInferError(f"{self.path} can't be read as GGUF (cut or damaged?): {what}; fetch it again")

    def number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        if self.place + size > self.size:
            raise self.damaged("it ends inside its header")
        (value,) = struct.unpack_from(kind, self.data, self.place)
        self.place += size
        return value

    def count(self, what: str, smallest: int) -> int:
        value = self.number("<Q")
        if value * smallest > self.size - self.place:
            raise self.damaged(f"{value} {what} don't fit into its {self.size} bytes")
        return value

    def text(self, what: str) -> str:
        length = self.count(f"bytes of {what}", 1)
        value = self.data[self.place : self.place + length]
        self.place += length
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is no UTF-8") from None

    def read(self) -> GGUFFile:
        version = self.number("<I")
        if version & 0xFFFF == 0:
            raise PartInferError(f"{self.path} is a big-endian GGUF file: convert the model to a little-endian one")
        if version not in VERSIONS:
            raise PartInferError(f"{self.path} has GGUF version {version}; versions 2 and 3 can be read")
        tensor_count = self.count("tensors", _SMALLEST_TENSOR)
        pairs = self.count("metadata keys", _SMALLEST_PAIR)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.text("a key")
            if not key or key in metadata:
                raise self.damaged(f"the key {key[:80]!r} is there twice or empty")
            metadata[key] = self.value(key, self.number("<I"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment must be a power of two, got {str(alignment)[:40]}")
        described = [self.tensor() for _ in range(tensor_count)]
        tensors: dict[str, StoredTensor] = {}
        start = -(-self.place // alignment) * alignment
        expected = 0
        for name, shape, kind, offset, nbytes in described:
            if name in tensors:
                raise self.damaged(f"the tensor {name!r} is there twice")
            if offset != expected:
                raise self.damaged(f"the tensor {name!r} should start at byte {expected} of the data, not {offset}")
            if start + offset + nbytes > self.size:
                raise self.damaged(f"the tensor {name!r} reaches beyond the file's {self.size} bytes")
            tensors[name] = StoredTensor(self.path, name, shape, kind, start + offset, nbytes)
            expected = -(-(offset + nbytes) // alignment) * alignment
        return GGUFFile(self.path, metadata, tensors)

    def value(self, key: str, kind: int) -> Any:
        what = f"the value of {key[:80]!r}"
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            kind = self.number("<I")
            if kind == _STRING:
                return self.texts(what)
            return self.numbers(what, kind, None)
        return self.numbers(what, kind, 1).item()

    def texts(self, what: str) -> list[str]:
        """A list of strings, in one loop: vocabularies and merges have hundreds of thousands."""
        data, size, length_at = self.data, self.size, struct.Struct("<Q").unpack_from
        values: list[bytes] = []
        count = self.count(f"strings of {what}", 8)
        place = self.place
        for _ in range(count):
            start = place + 8
            if start > size:
                raise self.damaged("it ends inside its header")
            place = start + length_at(data, place)[0]
            if place > size:
                raise self.damaged(f"{place - start} bytes of {what} don't fit into its {size} bytes")
            values.append(data[start:place])
        self.place = place
        try:
            return [value.decode("utf-8") for value in values]
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is no UTF-8") from None

    def numbers(self, what: str, kind: int, count: int | None) -> np.ndarray:
        if kind not in _NUMBERS:
            raise self.damaged(f"{what} has the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        count = self.count(f"numbers of {what}", dtype.itemsize) if count is None else count
        if self.place + count * dtype.itemsize > self.size:
            raise self.damaged("it ends inside its header")
        stored = self.data[self.place : self.place + count * dtype.itemsize]
        self.place += len(stored)
        if dtype.kind == "b":
            return np.frombuffer(stored, dtype=np.uint8) != 0
        return np.frombuffer(stored, dtype=dtype)

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
        """Name, shape, type, offset in the data, and bytes."""
        name = self.text("a tensor's name")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.damaged(f"the tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self.number("<I"), self.number("<Q")
        try:
            kind = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self.damaged(f"the tensor {name[:80]!r} has the unknown type {kind}") from None
        if not _can_be_unpacked(kind):
            raise PartInferError(f"{self.path} has {name} in {kind.name}, a type that can't be unpacked here")
        values = 1
        for size in shape:
            values *= size
        if values == 0 or shape[-1] % block:
            raise self.damaged(
                f"the tensor {name[:80]!r} has the shape {shape} in {kind.name}, blocks of {block} values"
            )
        return name, shape, kind, offset, values // block * block_bytes


@lru_cache
def _can_be_unpacked(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except (NotImplementedError, ValueError, KeyError):
        return False
    return True
