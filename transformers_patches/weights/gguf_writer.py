"""Write a model as a GGUF file, so that llama.cpp computes the same model in the same precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PretrainedConfig

from transformers_patches.errors import PartInferError
from transformers_patches.families import FAMILIES, family_of
from transformers_patches.weights.gguf_rope import FREQUENCIES

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
_BYTES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}


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
    family = family_of(config)
    check_can_be_written(config)
    layout = family.gguf
    writer = GGUFWriter(path, layout.architecture)
    _add_settings(writer, config, family.intermediate_size(config))
    factors = _add_rope(writer, config)
    for key, value in ({"tokenizer.ggml.model": "none"} if vocabulary is None else vocabulary).items():
        add_value(writer, key, value)
    writer.add_file_type(FILE_TYPES[dtype])
    names = _names(layout.architecture, config, weights)
    if factors is not None:
        writer.add_tensor_info(FREQUENCIES, factors.shape, factors.dtype, factors.nbytes)
    for name, stored in names.items():
        kind = _type_of(weights.shape(stored), dtype)
        shape = weights.shape(stored)
        if kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            shape = gguf.quant_shape_to_byte_shape(shape, kind)
        numpy_type = _BYTES.get(dtype if len(shape) > 1 else "float32", np.dtype(np.uint8))
        raw = None if numpy_type != np.uint8 else kind
        writer.add_tensor_info(name, shape, numpy_type, int(np.prod(shape)) * numpy_type.itemsize, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, stored in names.items():
        values = torch.empty(weights.shape(stored), dtype=getattr(torch, dtype, torch.float32))
        weights.read_into(stored, values)
        if layout.rotary_pairs and ".attn_q." in name:
            values = _paired(values, config.num_attention_heads)
        elif layout.rotary_pairs and ".attn_k." in name:
            values = _paired(values, config.num_key_value_heads)
        writer.write_tensor_data(_array(values, _type_of(values.shape, dtype)))
    writer.close()


def check_can_be_written(config: PretrainedConfig) -> None:
    """Raise PartInferError for an architecture that can't be written, and for what llama.cpp would compute otherwise."""
    layout = family_of(config).gguf
    if layout is None or not layout.can_be_written:
        known = [name for name, other in FAMILIES.items() if other.gguf and other.gguf.can_be_written]
        raise PartInferError(
            f"GGUF files can be written of {', '.join(known)} models, this one is {config.model_type}: llama.cpp's own "
            "convert_hf_to_gguf.py knows more"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise PartInferError(
            f"llama.cpp has no sliding window for {config.model_type} models, this one has one of {window} tokens"
        )
    if family_of(config).activation(config) not in ("silu", "swish"):
        raise PartInferError(f"llama.cpp computes {config.model_type} models with silu only")


def add_value(writer: GGUFWriter, key: str, value: object) -> None:
    """A key with the GGUF type that files have for such a value: integers are uint32, lists of them int32."""
    if isinstance(value, (list, tuple)):
        writer.add_array(key, value)
        return
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)


def _add_settings(writer: GGUFWriter, config: PretrainedConfig, intermediate_size: int) -> None:
    head_dim = _head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_rope(writer: GGUFWriter, config: PretrainedConfig) -> np.ndarray | None:
    """Say how positions are encoded; returns what frequencies are divided by, float32 [head_dim / 2], if that is needed.

    Llama 3's scaling is not in the metadata, but in that tensor. https://arxiv.org/abs/2407.21783
    """
    rope = config.rope_parameters
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
    writer.add_rope_freq_base(theta)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings")
        if kind == "yarn" and original:
            writer.add_rope_scaling_orig_ctx_len(original)
    odd = {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"} & {
        name for name, value in rope.items() if value is not None
    }
    if kind not in ("default", "linear", "yarn", "llama3") or odd or rope.get("partial_rotary_factor", 1.0) != 1.0:
        more = f" with {', '.join(sorted(odd))}" if odd else ""
        raise PartInferError(f"a GGUF file can't say the model's rope scaling ({kind}{more})")
    if kind != "llama3":
        return None
    half = _head_dim(config) // 2
    frequencies = theta ** -(np.arange(half, dtype=np.float64) / half)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


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


def _type_of(shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    return TYPES[dtype] if len(shape) > 1 else GGMLQuantizationType.F32


def _array(values: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    if kind == GGMLQuantizationType.F32:
        return values.float().numpy()
    if kind == GGMLQuantizationType.F16:
        return values.numpy()
    return values.contiguous().view(torch.uint8).numpy()  # bfloat16, which NumPy does not have


def _paired(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from [first halves, second halves] to pairs, as llama.cpp rotates them."""
    rows = values.shape[0] // heads
    return values.view(heads, 2, rows // 2, -1).transpose(1, 2).reshape(values.shape)
