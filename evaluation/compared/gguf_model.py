"""Write a model's weights as a GGUF file, so that llama.cpp computes the same model in the same precision."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PretrainedConfig

from transformers_patches.errors import PartInferError
from transformers_patches.families import FAMILIES, family_of
from transformers_patches.weights.source import WeightSource

TYPES = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
}
_BYTES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}


def write_gguf(path: Path, weights: WeightSource, config: PretrainedConfig, dtype: str) -> None:
    """Write all weights.

    dtype: a key of TYPES, for the matrices; vectors are float32, as llama.cpp wants them. The vocabulary is left out:
    token ids go in and come out. Raises PartInferError for an architecture that can't be written.
    """
    family = family_of(config)
    layout = family.gguf
    if layout is None or not layout.can_be_written:
        known = [name for name, other in FAMILIES.items() if other.gguf and other.gguf.can_be_written]
        raise PartInferError(
            f"llama.cpp can be compared for {', '.join(known)} models, this one is {config.model_type}: "
            "leave out --compare"
        )
    writer = GGUFWriter(path, layout.architecture)
    _add_settings(writer, config, family.intermediate_size(config))
    names = _names(layout.architecture, config, weights)
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
    for name, stored in names.items():
        values = torch.empty(weights.shape(stored), dtype=getattr(torch, dtype, torch.float32))
        weights.read_into(stored, values)
        if layout.rotary_pairs and ".attn_q." in name:
            values = _paired(values, config.num_attention_heads)
        elif layout.rotary_pairs and ".attn_k." in name:
            values = _paired(values, config.num_key_value_heads)
        writer.write_tensor_data(_array(values, _type_of(values.shape, dtype)))
    writer.close()


def _add_settings(writer: GGUFWriter, config: PretrainedConfig, intermediate_size: int) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
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
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _names(architecture: str, config: PretrainedConfig, weights: WeightSource) -> dict[str, str]:
    """Name in the GGUF file -> name in the source."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    names = {}
    for stored in sorted(weights.names()):
        if stored.endswith("rotary_emb.inv_freq"):
            continue
        name = table.get_name(stored, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise PartInferError(f"llama.cpp has no place for {stored}: leave out --compare")
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
