"""The transformers config of a GGUF file: what llama.cpp honours, with llama.cpp's defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from transformers import AutoConfig, PretrainedConfig

from transformers_patches.errors import PartInferError
from transformers_patches.families import FAMILIES
from transformers_patches.weights.gguf_architectures import MORE_LAYERS, RMS, Architecture, architecture_of
from transformers_patches.weights.gguf_family import biased_together, family_of
from transformers_patches.weights.gguf_file import GGUFFile, read_gguf
from transformers_patches.weights.gguf_kept import Kept, TokenFacts
from transformers_patches.weights.gguf_rope import FACTOR_TENSORS, gemma_rope_parameters, rope_parameters
from transformers_patches.weights.gguf_schema import Metadata
from transformers_patches.weights.gguf_settings import settings_of
from transformers_patches.weights.gguf_vocabulary import has_vocabulary, read_vocabulary

GEMMA2_WINDOW, GEMMA2_ATTENTION_SOFTCAP, GEMMA2_LOGIT_SOFTCAP = 4096, 50.0, 30.0  # where a file does not say
WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6}  # of every so many layers, the last one has no window
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of those that scale attention by H / heads, the 27B ones


def gguf_config(path: Path) -> PretrainedConfig:
    """The transformers config that the file's metadata stand for.

    Raises PartInferError if the file is damaged, of another architecture, or sets what can't be followed; and if its
    sizes are not those of its tensors, so that nothing is built that does not fit into the file.
    """
    return config_of(read_gguf(path))


def config_of(file: GGUFFile) -> PretrainedConfig:
    """The same of a file whose header was read already."""
    metadata = Metadata(file)
    architecture = architecture_of(metadata)
    family = None if architecture else family_of(metadata)
    metadata.check_keys(architecture.keys if architecture else set())
    fields = _sizes(metadata, architecture)
    if architecture is None or not architecture.has_experts:
        _check_no_experts(metadata)
    _check_layers(file, fields)
    if architecture is not None and architecture.more_layers:
        fields["num_hidden_layers"] -= metadata.integer(
            metadata.of_model(MORE_LAYERS), 0, high=fields["num_hidden_layers"] - 1
        )
    if architecture is None:
        _check_projections(file, fields)
    partial = architecture is not None and architecture.partial_rotary
    rope = rope_parameters(metadata, fields["head_dim"], _rope_factors(file), partial=partial)
    fields |= _token_ids(metadata, fields["vocab_size"])
    if architecture is not None:
        model_type = architecture.model_type
        fields |= {"rope_parameters": rope} | settings_of(architecture, metadata, fields, rope)
    else:
        model_type = next(name for name, known in FAMILIES.items() if known is family)
        fields |= _biases(file, metadata.architecture) | {"rope_parameters": rope}
        if metadata.architecture in WINDOW_PATTERNS:
            fields |= _gemma(metadata, fields) | {"rope_parameters": gemma_rope_parameters(metadata, rope)}
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # of transformers' own checks, whatever their type
        raise PartInferError(f"{file.path} can't be used: {' '.join(str(error).split())[:200]}") from None
    config.dtype = _float_type(file)
    return config


def _sizes(metadata: Metadata, architecture: Architecture | None) -> dict[str, Any]:
    epsilon = RMS if architecture is None else architecture.epsilon
    key, file = metadata.of_model, metadata.file
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise PartInferError(f"{file.path} has no token_embd.weight: it is damaged, or no language model")
    if not metadata.flag(key("attention.causal"), True):
        raise PartInferError(f"{file.path} does not generate text: its attention is not causal")
    hidden = metadata.integer(key("embedding_length"), low=1)
    heads = metadata.integer(key("attention.head_count"), low=1)
    kinds = {}
    if architecture is not None and architecture.missing_heads:
        kv_heads, kinds = _heads_by_layer(metadata, architecture.missing_heads)
    else:
        kv_heads = metadata.integer(key("attention.head_count_kv"), heads, low=1)
    head_dim = metadata.integer(key("attention.key_length"), hidden // heads, low=1)
    if (
        metadata.integer(key("attention.value_length"), head_dim if head_dim * heads == hidden else hidden // heads)
        != head_dim
    ):
        raise PartInferError(f"{file.path} has values of another length than keys, which can't be computed")
    if heads % kv_heads or head_dim % 2:
        raise PartInferError(
            f"{file.path} has {heads} heads of {head_dim} dimensions, {kv_heads} of keys: expected an even number of "
            "dimensions, and as many heads for each of the keys"
        )
    return {
        "vocab_size": embeddings.shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.integer(key("feed_forward_length"), low=1),
        "num_hidden_layers": metadata.integer(key("block_count"), low=1),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer(key("context_length"), low=1),
        epsilon[0]: metadata.number(key(epsilon[1])),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    } | kinds


def _heads_by_layer(metadata: Metadata, missing: str) -> tuple[int, dict[str, list[str]]]:
    """Heads for keys, and `layer_types`, of which those without such heads are `missing`."""
    key = metadata.of_model("attention.head_count_kv")
    layers = metadata.integer(metadata.of_model("block_count"), low=1)
    counts = metadata.numbers(key, layers)
    given = [] if counts is None else [int(count) for count in counts[:layers]]
    some = set(given) - {0}
    if len(some) != 1 or min(some) < 1:
        raise metadata.error(key, f"a list of one number or 0 for each of {layers} layers")
    return some.pop(), {"layer_types": ["full_attention" if count else missing for count in given]}


def _check_no_experts(metadata: Metadata) -> None:
    for name in ("expert_count", "expert_used_count"):
        key = metadata.of_model(name)
        if metadata.integer(key, 0):
            raise PartInferError(
                f"{metadata.file.path} is a mixture of experts ({key}), which {metadata.architecture} has not"
            )


def _check_layers(file: GGUFFile, fields: dict[str, Any]) -> None:
    """Raise PartInferError unless the tensors are those of as many layers as the metadata tell."""
    layers = {int(match[1]) for name in file.tensors if (match := re.match(r"blk\.(\d{1,6})\.", name))}
    if layers != set(range(len(layers))) or len(layers) != fields["num_hidden_layers"]:
        raise PartInferError(
            f"{file.path} has tensors of {len(layers)} layers, but block_count {fields['num_hidden_layers']}: fetch it again"
        )
    stored, expected = file.tensors["token_embd.weight"].shape, (fields["vocab_size"], fields["hidden_size"])
    if stored != expected:
        raise _another_shape(file, "token_embd", stored, expected)


def _check_projections(file: GGUFFile, fields: dict[str, Any]) -> None:
    """Raise PartInferError unless the first block has the sizes that the metadata tell."""
    hidden, head_dim = fields["hidden_size"], fields["head_dim"]
    expected = {
        "blk.0.attn_q": (fields["num_attention_heads"] * head_dim, hidden),
        "blk.0.attn_k": (fields["num_key_value_heads"] * head_dim, hidden),
        "blk.0.attn_v": (fields["num_key_value_heads"] * head_dim, hidden),
        "blk.0.ffn_up": (fields["intermediate_size"], hidden),
    }
    for name, shape in expected.items():
        stored = file.tensors.get(f"{name}.weight")
        if stored is None or stored.shape != shape:
            raise _another_shape(file, name, None if stored is None else stored.shape, shape)


def _another_shape(file: GGUFFile, name: str, stored: tuple | None, expected: tuple) -> PartInferError:
    given = "is not there" if stored is None else f"is {list(stored)}"
    return PartInferError(f"{file.path}: {name}.weight {given}, but the metadata mean {list(expected)}: fetch it again")


def _rope_factors(file: GGUFFile) -> dict[str, np.ndarray]:
    found = {}
    for name in FACTOR_TENSORS:
        if name in file.tensors:
            stored = file.tensors[name]
            packed = np.fromfile(stored.path, dtype=np.uint8, count=stored.nbytes, offset=stored.offset)
            found[name] = dequantize(packed.reshape(1, -1), stored.kind).reshape(-1).astype(np.float32)
    return found


def _biases(file: GGUFFile, architecture: str) -> dict[str, bool]:
    """Whether attention and FFNs have biases, where a config says that."""
    biased = {name for group in biased_together(file, architecture) for name in group}
    fields = {} if architecture == "qwen2" else {"attention_bias": "attn_q" in biased}
    return fields | ({"mlp_bias": "ffn_up" in biased} if architecture == "llama" else {})


def _token_ids(metadata: Metadata, rows: int) -> dict[str, Any]:
    if not has_vocabulary(metadata):
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    facts = Kept(metadata.file.path).facts() or TokenFacts.of(read_vocabulary(metadata))
    if facts.count != rows:
        raise PartInferError(f"{metadata.file.path} has {facts.count} tokens, but embeddings of {rows}: fetch it again")
    return {
        "bos_token_id": facts.bos,
        "eos_token_id": (facts.ends if len(facts.ends) > 1 else facts.ends[0]) if facts.ends else None,
        "pad_token_id": facts.pad,
    }


def _gemma(metadata: Metadata, fields: dict[str, Any]) -> dict[str, Any]:
    """Attention scale, windows and softcaps of Gemma 2 and 3.

    The scale is not in the file: llama.cpp recognises the largest models.
    """
    key, layers = metadata.of_model, fields["num_hidden_layers"]
    second = metadata.architecture == "gemma2"
    window = metadata.integer(key("attention.sliding_window"), GEMMA2_WINDOW if second else 0)
    largest = LARGEST_GEMMA[metadata.architecture] == layers
    softcap = metadata.number(key("final_logit_softcapping"), GEMMA2_LOGIT_SOFTCAP if second else 0.0)
    found = {
        "query_pre_attn_scalar": fields["hidden_size"] // fields["num_attention_heads"]
        if largest
        else fields["head_dim"],
        "final_logit_softcapping": softcap or None,
        "layer_types": _layer_types(metadata, layers, window),
        "sliding_window": window or fields["max_position_embeddings"],  # needs a number even if no layer has a window
    }
    if second:
        attention = metadata.number(key("attn_logit_softcapping"), GEMMA2_ATTENTION_SOFTCAP)
        if not attention or not softcap:
            raise PartInferError(f"{metadata.file.path}: the softcaps of Gemma 2 must be above 0: fetch it again")
        found["attn_logit_softcapping"] = attention
    return found


def _layer_types(metadata: Metadata, layers: int, window: int) -> list[str]:
    key = metadata.of_model("attention.sliding_window_pattern")
    given = metadata.file.metadata.get(key) if metadata.has(key) else None
    if isinstance(given, np.ndarray):
        windowed = [bool(value) for value in metadata.numbers(key, layers)[:layers]]
    else:
        period = metadata.integer(key, WINDOW_PATTERNS[metadata.architecture])
        windowed = [period == 0 or layer % period < period - 1 for layer in range(layers)]
    return ["sliding_attention" if window and here else "full_attention" for here in windowed]


def _float_type(file: GGUFFile) -> torch.dtype:
    """The type that the file's matrices have, bfloat16 where they are quantised."""
    types = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    plain = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
    return plain.get(types.pop(), torch.bfloat16) if len(types) == 1 else torch.bfloat16
