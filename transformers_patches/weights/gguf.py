"""The tensors of a GGUF file by their transformers names, unpacked row by row: a WeightSource."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from transformers_patches.errors import PartInferError
from transformers_patches.families import Family, gguf_family
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.weights.file_state import FilesInUse
from transformers_patches.weights.gguf_file import GGUFFile, StoredTensor, read_gguf
from transformers_patches.weights.gguf_rope import FACTOR_TENSORS
from transformers_patches.weights.gguf_schema import Metadata
from transformers_patches.weights.source import Source, WeightSource

_ATTENTION_INPUTS = ("attn_q", "attn_k", "attn_v")
_FFN = ("ffn_gate", "ffn_up", "ffn_down")
VALUES_AT_ONCE = 2**21  # that are unpacked together; they are float32 for a moment


@dataclass(frozen=True)
class _Stored:
    """A tensor of the model, and where it lies in the file."""

    name: str  # in the file
    path: Path | None  # the file; None: it is not there, and its values are 0
    shape: tuple[int, ...]  # as PyTorch has it
    kind: GGMLQuantizationType  # how its values are packed
    offset: int  # its first byte in the file
    nbytes: int  # its packed size
    heads: int  # heads of a weight whose rows were reordered, else 0
    add: float  # what undoes the converter's change of a norm

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows


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
        metadata = Metadata(file)
        name = metadata.architecture
        self._family = family_of(metadata)
        self._names = self._family.gguf_names()
        heads = metadata.integer(f"{name}.attention.head_count", low=1)
        self._heads = {"attn_q": heads, "attn_k": metadata.integer(f"{name}.attention.head_count_kv", heads, low=1)}
        self._in_use = FilesInUse()
        for tensor in file.tensors.values():
            self._in_use.add(tensor.path)
        self._tensors = {
            self._name(tensor.name): self._stored(tensor)
            for tensor in file.tensors.values()
            if tensor.name not in FACTOR_TENSORS
        }
        for tensor in missing_biases(file, name):
            zero = _Stored(tensor.name, None, tensor.shape, tensor.kind, 0, 0, 0, 0.0)
            self._tensors[self._name(tensor.name)] = zero

    def _name(self, name: str) -> str:
        """The transformers name; an unknown one stays as it is, and the loader finds no place for it."""
        head, _, kind = name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", head)
        place = self._names.get(f"blk.{match[2]}" if match else head)
        if place is None:
            return name
        return f"{self._family.layers}.{match[1]}.{place}.{kind}" if match else f"{place}.{kind}"

    def _stored(self, tensor: StoredTensor) -> _Stored:
        projection = re.fullmatch(r"blk\.\d+\.(attn_q|attn_k)\.(weight|bias)", tensor.name)
        heads = self._heads[projection[1]] if projection and self._family.gguf.rotary_pairs else 0
        if heads and tensor.shape[0] % (2 * heads):
            raise PartInferError(
                f"{self.path}: the {tensor.shape[0]} rows of {tensor.name} are no pairs of {heads} heads: fetch it again"
            )
        norm = tensor.name.endswith("norm.weight")
        add = -self._family.norm_offset if norm else 0.0  # the converter adds it to the weights
        return _Stored(tensor.name, tensor.path, tensor.shape, tensor.kind, tensor.offset, tensor.nbytes, heads, add)

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """What it is unpacked to."""
        return torch.float32

    def total_bytes(self) -> int:
        """Size of all tensors in the file, packed."""
        return sum(stored.nbytes for stored in self._tensors.values())

    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        stored = self._tensors[name]
        if stored.path is None:
            out.zero_()
            return
        if len(stored.shape) == 1:
            values = self._unpack(stored, torch.zeros(1, dtype=torch.int64))[0]
            values = values if stored.heads == 0 else values[_places_of_pairs(len(values), stored.heads)]
            out.copy_(values if rows is None else values[rows])
            return
        rows = torch.arange(stored.rows) if rows is None else rows
        places = _places_of_pairs(stored.rows, stored.heads)[rows] if stored.heads else rows
        order = places.argsort()  # the file is read front to back
        for part in order.split(max(1, VALUES_AT_ONCE // stored.shape[1])):
            out[part.to(out.device)] = self._unpack(stored, places[part]).to(out.device, out.dtype)

    def read_columns_into(self, source: Source, out: torch.Tensor) -> None:
        """Packed rows are whole, so all of the tensor is read."""
        stored, rest = self._tensors[source.name], source.left_out
        for part in torch.arange(stored.rows).split(max(1, VALUES_AT_ONCE // stored.shape[1])):
            values = self._unpack(stored, part)
            if rest is not None:
                rest.out[part] = values.index_select(1, rest.columns) @ rest.weights
            if source.largest is not None:
                source.largest[part] = values.abs().amax(dim=1)
            out[:, part[0] : part[-1] + 1] = values.index_select(1, source.neurons).t().to(out.device, out.dtype)

    def _unpack(self, stored: _Stored, rows: torch.Tensor) -> torch.Tensor:
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
        with np.errstate(all="ignore"):  # of scales that are not finite
            unpacked = dequantize(packed, stored.kind)
        values = torch.from_numpy(np.ascontiguousarray(unpacked, dtype=np.float32))
        if not all(math.isfinite(end) for end in values.aminmax()):
            raise PartInferError(
                f"{stored.path}: {stored.name} has values that are not finite: the file is damaged, or the training was"
            )
        return values + stored.add if stored.add else values

    def fill(self, requests: Iterable[tuple[Source, torch.Tensor | QuantizedTensor]]) -> None:
        super().fill(requests)
        self._in_use.check_unchanged()


@contextmanager
def _as_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PartInferError(
            f"{path} can't be read (truncated?): {error.strerror or error}; fetch the model again"
        ) from None


def family_of(metadata: Metadata) -> Family:
    """The family of a file's architecture; PartInferError if it can't be read."""
    try:
        return gguf_family(metadata.architecture[:80])
    except PartInferError as error:
        raise PartInferError(f"{metadata.file.path} can't be read: {error}") from None


def biased_together(file: GGUFFile, architecture: str) -> list[tuple[str, ...]]:
    """Groups of a block's projections that have biases in the transformers model: if one of a group has, all have.

    llama.cpp adds those that are there. Qwen 2 always has those of its attention inputs; only Llamas may have some in
    their FFNs.
    """
    if architecture == "qwen2":
        return [_ATTENTION_INPUTS]
    groups = [(*_ATTENTION_INPUTS, "attn_output"), *([_FFN] if architecture == "llama" else [])]
    biased = {name.split(".")[2] for name in file.tensors if re.fullmatch(r"blk\.\d+\.\w+\.bias", name)}
    return [group for group in groups if biased & set(group)]


def missing_biases(file: GGUFFile, architecture: str) -> list[StoredTensor]:
    """Biases of `biased_together` that the file lacks, which are 0."""
    missing = []
    for group in biased_together(file, architecture):
        for tensor in file.tensors.values():
            match = re.fullmatch(r"blk\.\d+\.(\w+)\.weight", tensor.name)
            bias = tensor.name.removesuffix("weight") + "bias"
            if match and match[1] in group and bias not in file.tensors:
                kind = GGMLQuantizationType.F32
                missing.append(StoredTensor(tensor.path, bias, tensor.shape[:1], kind, 0, 0))
    return missing


def _places_of_pairs(rows: int, heads: int) -> torch.Tensor:
    """int64 [rows]: where row r of transformers' layout is in the file, whose heads hold rotary pairs, not halves."""
    half = rows // heads // 2
    return torch.arange(rows).view(heads, half, 2).transpose(1, 2).reshape(rows)
