"""The config's fields that a GGUF file of one of ARCHITECTURES sets, beside sizes, positions and tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf_architectures import (
    MAY_BE_ZERO,
    PATTERN,
    ROTATED,
    TEMPERATURE,
    WINDOW,
    Architecture,
)
from transformers_patches.weights.gguf_schema import Metadata


def settings_of(
    architecture: Architecture, metadata: Metadata, sizes: dict[str, Any], rope: dict[str, Any]
) -> dict[str, Any]:
    """Fields of the config. sizes: of those that were read already; rope: the `rope_parameters`.

    Raises PartInferError for values that can't be followed, and for sizes of experts that the router's tensor has not.
    """
    key = metadata.of_model
    for name, expected in architecture.expected.items():
        if metadata.has(key(name)) and metadata.file.metadata[key(name)] != expected:
            metadata.refuse(key(name), f"only {str(expected).lower()} can be computed")
    fields: dict[str, Any] = dict(architecture.fixed)
    for name, stored in architecture.integers.items():
        fields[name] = metadata.integer(key(stored), low=0 if stored in MAY_BE_ZERO else 1)
    for name, (stored, default) in architecture.numbers.items():
        fields[name] = metadata.number(key(stored), sizes["head_dim"] ** -0.5 if default is None else default)
    for name, (stored, default) in architecture.flags.items():
        fields[name] = metadata.flag(key(stored), default)
    for name, tensor in architecture.present.items():
        fields[name] = f"blk.0.{tensor}" in metadata.file.tensors
    if architecture.has_experts:
        _check_router(architecture, metadata, fields, sizes["hidden_size"])
    if architecture.window:
        fields |= _windows(architecture, metadata, sizes["num_hidden_layers"])
    if "original_max_position_embeddings" in rope:  # Phi-3 has a field of its own, which wins
        fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if architecture.mamba:
        fields |= _mamba(metadata, sizes["hidden_size"])
    return fields | _positions(architecture.model_type, metadata, rope)


def _positions(model_type: str, metadata: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """What architectures say otherwise about positions than `rope`."""
    if model_type == "gpt_oss" and rope["rope_type"] == "yarn":  # as OpenAI computes it
        return {"rope_parameters": rope | {"truncate": False}}
    if model_type == "olmo3":  # layers with a window have no scaling
        near = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": near}}
    if model_type == "granitemoehybrid":
        rotated = metadata.flag(metadata.of_model(ROTATED), True)
        return {"position_embedding_type": "rope" if rotated else "nope"}
    if model_type == "ministral3":
        beta = metadata.number(metadata.of_model(TEMPERATURE))  # what has none (Mistral Small 3.1) is another model
        if rope["rope_type"] != "yarn" or "attention_factor" in rope:
            raise PartInferError(
                f"{metadata.file.path}: only YaRN of magnitude 1 can be computed beside {metadata.of_model(TEMPERATURE)}"
            )
        return {"rope_parameters": rope | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": beta}}
    return {}


def _mamba(metadata: Metadata, hidden: int) -> dict[str, Any]:
    """Sizes of Mamba 2's layers, and what they have."""
    names = {"mamba_d_conv": "conv_kernel", "mamba_d_state": "state_size", "mamba_n_groups": "group_count"}
    fields: dict[str, Any] = {
        name: metadata.integer(metadata.of_model(f"ssm.{stored}"), low=1) for name, stored in names.items()
    }
    inner = metadata.integer(metadata.of_model("ssm.inner_size"), low=1)
    heads = metadata.integer(metadata.of_model("ssm.time_step_rank"), low=1)
    if inner % heads:
        raise PartInferError(f"{metadata.file.path} has {heads} heads in {inner} channels of Mamba: fetch it again")
    tensors = {name.split(".", 2)[-1] for name in metadata.file.tensors if name.startswith("blk.")}
    fields |= {"mamba_n_heads": heads, "mamba_d_head": inner // heads, "mamba_conv_bias": "ssm_conv1d.bias" in tensors}
    if metadata.architecture == "falcon-h1":
        return fields | {"mamba_d_ssm": inner, "mamba_rms_norm": "ssm_norm.weight" in tensors}
    if inner % hidden:
        raise PartInferError(f"{metadata.file.path} has {inner} channels of Mamba for {hidden}: fetch it again")
    return fields | {"mamba_expand": inner // hidden}


def _check_router(architecture: Architecture, metadata: Metadata, fields: dict[str, Any], hidden: int) -> None:
    """Raise PartInferError unless the router chooses among as many experts as the metadata tell."""
    count = next(fields[name] for name, key in architecture.integers.items() if key == "expert_count")
    used = next(fields[name] for name, key in architecture.integers.items() if key == "expert_used_count")
    routers = {tensor.shape for name, tensor in metadata.file.tensors.items() if name.endswith(".ffn_gate_inp.weight")}
    if routers != {(count, hidden)} or used > count:
        raise PartInferError(
            f"{metadata.file.path} says {used} of {count} experts for every token, but its routers have the shapes "
            f"{sorted(map(list, routers))}: fetch it again"
        )


def _windows(architecture: Architecture, metadata: Metadata, layers: int) -> dict[str, Any]:
    """The sliding window, and which layers have it."""
    window = metadata.integer(metadata.of_model(WINDOW), 0)
    if architecture.window == 1:
        return {"sliding_window": window or None}
    key = metadata.of_model(PATTERN)
    if isinstance(metadata.file.metadata.get(key), np.ndarray) and metadata.has(key):
        windowed = [bool(value) for value in metadata.numbers(key, layers)[:layers]]
    else:
        period = metadata.integer(key, architecture.window, low=1)
        windowed = [layer % period < period - 1 for layer in range(layers)]
    types = ["sliding_attention" if window and here else "full_attention" for here in windowed]
    return {"sliding_window": window or None, "layer_types": types}
