"""Write a model as a GGUF file, so that llama.cpp computes the same model in the same precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PretrainedConfig

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf_architectures import Architecture
from transformers_patches.weights.gguf_rope import FREQUENCIES
from transformers_patches.weights.gguf_written import (
    architecture_for,
    check_llama_cpp,
    check_written,
    rope_factors,
    settings_metadata,
)

TYPES = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
}
FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
}
_TORCH = {kind: getattr(torch, name) for name, kind in TYPES.items()}
_NUMPY = {GGMLQuantizationType.F32: np.dtype(np.float32), GGMLQuantizationType.F16: np.dtype(np.float16)}
_CONVOLUTION = "shortconv.conv"


class Weights(Protocol):
    """What is asked of weights: their names in transformers, shapes and values."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read_into(self, name: str, out: torch.Tensor) -> None: ...


def write_gguf(
    path: Path,
    weights: Weights,
    config: PretrainedConfig,
    dtype: str,
    vocabulary: Mapping[str, object] | None = None,
) -> None:
    """Write all weights.

    dtype: a key of TYPES, for the matrices; vectors are float32, as llama.cpp wants them.
    vocabulary: metadata of the tokenizer, by key. None: token ids go in and come out.

    Raises PartInferError for an architecture that can't be written, and for settings that llama.cpp does not have for it.
    """
    check_can_be_written(config)
    name, architecture = architecture_for(config)
    writer = GGUFWriter(path, name)
    metadata = settings_metadata(config) | ({"tokenizer.ggml.model": "none"} if vocabulary is None else vocabulary)
    for key, value in metadata.items():
        add_value(writer, key, value)
    writer.add_file_type(FILE_TYPES[dtype])
    names, factors = _names(name, config, weights), rope_factors(config)
    shapes = {place: _stored_shape(place, weights.shape(own)) for place, own in names.items()}
    if factors is not None:
        writer.add_tensor_info(FREQUENCIES, factors.shape, factors.dtype, factors.nbytes)
    for place, shape in shapes.items():
        _announce(writer, place, shape, _type_of(place, shape, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for place, own in names.items():
        kind = _type_of(place, shapes[place], dtype)
        values = torch.empty(weights.shape(own), dtype=_TORCH[kind])
        weights.read_into(own, values)
        writer.write_tensor_data(_array(_as_stored(place, values, config, architecture).reshape(shapes[place]), kind))
    writer.close()
    check_written(path, config)


def check_can_be_written(config: PretrainedConfig) -> None:
    """Raise PartInferError for an architecture that can't be written, and for what llama.cpp would compute otherwise.

    What only the whole file shows is checked when it is written.
    """
    check_llama_cpp(config)
    settings_metadata(config)


def add_value(writer: GGUFWriter, key: str, value: object) -> None:
    """A key with the GGUF type that files have for such a value: integers are uint32, lists of them int32."""
    if isinstance(value, (list, tuple)):
        writer.add_array(key, value)
        return
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    """Say that a tensor comes."""
    if kind in _NUMPY:
        numpy_type, raw = _NUMPY[kind], None
    else:
        shape, numpy_type, raw = gguf.quant_shape_to_byte_shape(shape, kind), np.dtype(np.uint8), kind
    writer.add_tensor_info(name, shape, numpy_type, int(np.prod(shape)) * numpy_type.itemsize, raw)


def _names(architecture: str, config: PretrainedConfig, weights: Weights) -> dict[str, str]:
    """Name in the GGUF file -> name in the source."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    names = {}
    for stored in sorted(weights.names()):
        if stored.endswith("rotary_emb.inv_freq"):
            continue
        name = table.get_name(stored, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise PartInferError(f"llama.cpp has no place for {stored}")
        names[name] = stored
    return names


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Filters of convolutions have no dimension of 1 in files."""
    return tuple(size for size in shape if size > 1) if _CONVOLUTION in name else shape


def _type_of(name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    return TYPES[dtype] if len(shape) > 1 and _CONVOLUTION not in name else GGMLQuantizationType.F32


def _array(values: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    if kind in _NUMPY:
        return values.contiguous().numpy()
    return values.contiguous().view(torch.uint8).numpy()  # bfloat16, which NumPy does not have


def _as_stored(name: str, values: torch.Tensor, config: PretrainedConfig, architecture: Architecture) -> torch.Tensor:
    """A weight with the changes that llama.cpp's converter makes."""
    if architecture.rotary_pairs and ".attn_q." in name:
        return _paired(values, config.num_attention_heads)
    if architecture.rotary_pairs and ".attn_k." in name:
        return _paired(values, config.num_key_value_heads)
    if architecture.qkv_by_kind and ".attn_qkv." in name:
        by_head = values.view(config.num_attention_heads, 3, -1, *values.shape[1:])
        return by_head.transpose(0, 1).reshape(values.shape)
    return values + architecture.norm_offset if name.endswith("norm.weight") else values


def _paired(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from [first halves, second halves] to pairs, as llama.cpp rotates them."""
    rows = values.shape[0] // heads
    return values.view(heads, 2, rows // 2, -1).transpose(1, 2).reshape(values.shape)
