"""The tensors of a GGUF file by their transformers names, unpacked row by row: a WeightSource."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import nn

from transformers_patches.errors import PartInferError
from transformers_patches.families import gguf_family
from transformers_patches.weights.source import Source, WeightSource

VALUES_AT_ONCE = 2**21  # that are unpacked together; they are float32 for a moment
ROPE_FACTORS = "rope_freqs.weight"  # what rotary frequencies are divided by; no weight of the transformers model


@dataclass(frozen=True)
class _Stored:
    """A tensor in the file: its shape as PyTorch has it, and where its rows lie."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int
    heads: int  # of a weight whose rows were reordered, else 0
    add: float  # what undoes the converter's change of a norm

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows


def open_reader(path: Path) -> GGUFReader:
    """The gguf package's reader; PartInferError if the file is none or damaged."""
    try:
        return GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PartInferError(f"{path} can't be read as GGUF (truncated?): {reason}; fetch it again") from None


class GGUFCheckpoint(WeightSource):
    """The tensors of one GGUF file, in any type that the gguf package can unpack (Q8_0, Q4_0, Q4_K, F16, …).

    Reads and unpacks only the rows that are asked for; nothing keeps the file mapped. bytes_read counts packed bytes.
    Raises PartInferError for damaged files and for architectures whose names are not known here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.source = str(path)
        self.bytes_read = 0
        reader = open_reader(self.path)
        name = reader.get_field("general.architecture").contents()
        try:
            self._family = gguf_family(name)
        except PartInferError as error:
            raise PartInferError(f"{path} can't be read: {error}") from None
        self._names = self._family.gguf_names()
        heads = reader.get_field(f"{name}.attention.head_count").contents()
        kv_heads = reader.get_field(f"{name}.attention.head_count_kv")
        self._heads = {"attn_q": heads, "attn_k": kv_heads.contents() if kv_heads else heads}
        self._tensors: dict[str, _Stored] = {}
        self._factors: _Stored | None = None
        for tensor in reader.tensors:
            stored = self._stored(tensor)
            if tensor.name == ROPE_FACTORS:
                self._factors = stored
            else:
                self._tensors[self._name(tensor.name)] = stored

    def _name(self, name: str) -> str:
        """The transformers name; an unknown one stays as it is, and the loader finds no place for it."""
        head, _, kind = name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", head)
        place = self._names.get(f"blk.{match[2]}" if match else head)
        if place is None:
            return name
        return f"{self._family.layers}.{match[1]}.{place}.{kind}" if match else f"{place}.{kind}"

    def _stored(self, tensor) -> _Stored:
        projection = re.fullmatch(r"blk\.\d+\.(attn_q|attn_k)\.(weight|bias)", tensor.name)
        heads = self._heads[projection[1]] if projection and self._family.gguf.rotary_pairs else 0
        norm = tensor.name.endswith("norm.weight")
        return _Stored(
            tuple(int(size) for size in reversed(tensor.shape)),
            tensor.tensor_type,
            int(tensor.data_offset),
            int(tensor.n_bytes),
            heads,
            -self._family.norm_offset if norm else 0.0,  # the converter adds it to the weights
        )

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

    def rope_factors(self) -> torch.Tensor | None:
        return None if self._factors is None else self._unpack(self._factors, torch.zeros(1, dtype=torch.int64))[0]

    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        stored = self._tensors[name]
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
        """float32 [len(rows), columns] of a tensor's rows as they lie in the file."""
        shape = (stored.rows, stored.row_bytes)
        packed = np.memmap(self.path, dtype=np.uint8, mode="r", offset=stored.offset, shape=shape)[rows.numpy()]
        self.bytes_read += packed.nbytes
        values = torch.from_numpy(np.ascontiguousarray(dequantize(np.asarray(packed), stored.kind), dtype=np.float32))
        return values + stored.add if stored.add else values


def apply_rope_factors(model: nn.Module, weights: WeightSource) -> None:
    """Divide the rotary frequencies by the file's factors: Llama 3's scaling, which the file's metadata don't tell."""
    factors = weights.rope_factors()
    if factors is not None:
        rotary = model.model.rotary_emb
        for frequencies in (rotary.inv_freq, rotary.original_inv_freq):
            frequencies.div_(factors.to(frequencies.device))


def _places_of_pairs(rows: int, heads: int) -> torch.Tensor:
    """int64 [rows]: where row r of transformers' layout is in the file, whose heads hold rotary pairs, not halves."""
    half = rows // heads // 2
    return torch.arange(rows).view(heads, half, 2).transpose(1, 2).reshape(rows)
