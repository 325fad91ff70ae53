"""Tiny models of the table (`tests/model_table.py`) as GGUF files, changed as llama.cpp's converter changes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.tiny_gguf import add_value

PAIRS = (
    "llama",
    "smollm3",
    "granite",
    "granitehybrid",
    "granitemoe",
    "arcee",
    "mistral3",
)  # architectures whose q and k have rotary pairs in files


@dataclass(frozen=True)
class Stored:
    """What a model's file says, beside what all files say; keys without the architecture's name.

    architecture: of the file.
    keys: key -> field of the config.
    values: key -> value.
    names: names of weights in the checkpoint that the gguf package knows, where transformers has others.
    """

    architecture: str
    keys: dict[str, str] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
LOCAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
OWN_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}
LFM2 = {"attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"}
MAMBA = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
}
FILES: dict[str, Stored] = {
    "gemma": Stored("gemma", RMS),
    "smollm3": Stored("smollm3", RMS),
    "granite": Stored("granite", RMS | GRANITE),
    "olmo2": Stored("olmo2", RMS),
    "olmo3": Stored("olmo2", RMS | WINDOW),
    "exaone4": Stored("exaone4", RMS | WINDOW),
    "ernie4_5": Stored("ernie4_5", RMS),
    "hunyuan_v1_dense": Stored("hunyuan-dense", RMS),
    "seed_oss": Stored("seed_oss", RMS),
    "glm": Stored("chatglm", RMS),
    "glm4": Stored("glm4", RMS),
    "phi3": Stored("phi3", RMS | WINDOW),
    "cohere2": Stored(
        "cohere2", {"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"} | WINDOW
    ),
    "nemotron": Stored("nemotron", {"attention.layer_norm_epsilon": "norm_eps"}),
    "arcee": Stored("arcee", RMS),
    "gpt_neox": Stored(
        "gptneox",
        {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
    ),
    "starcoder2": Stored("starcoder2", {"attention.layer_norm_epsilon": "norm_epsilon"}),
    "qwen3_moe": Stored("qwen3moe", RMS | EXPERTS | OWN_SIZE),
    "qwen2_moe": Stored(
        "qwen2moe",
        RMS | EXPERTS | OWN_SIZE | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "olmoe": Stored("olmoe", RMS | EXPERTS),
    "mixtral": Stored("llama", RMS | LOCAL),
    "glm4_moe": Stored(
        "glm4moe",
        RMS
        | OWN_SIZE
        | {
            "expert_count": "n_routed_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_shared_count": "n_shared_experts",
            "leading_dense_block_count": "first_k_dense_replace",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
        },
        {"expert_gating_func": 2},
        {".e_score_correction_bias": ".e_score_correction.bias"},
    ),
    "lfm2": Stored("lfm2", LFM2),
    "lfm2_moe": Stored(
        "lfm2moe",
        LFM2 | EXPERTS | OWN_SIZE | {"leading_dense_block_count": "num_dense_layers"},
        {"expert_gating_func": 2},
        {".expert_bias": ".expert_bias.bias"},
    ),
    "gpt_oss": Stored(
        "gpt-oss",
        RMS | WINDOW | LOCAL | {"expert_feed_forward_length": "intermediate_size"},
        names={".sinks": ".sinks.weight"},
    ),
    "granitemoehybrid": Stored(
        "granitehybrid",
        RMS | GRANITE | MAMBA | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
        {"rope.scaling.finetuned": False},
        {".dt_bias": ".dt_proj.bias", ".router.weight": ".router.layer.weight"},
    ),
    "falcon_h1": Stored("falcon-h1", RMS | MAMBA, names={".dt_bias": ".dt_proj.bias"}),
    "apertus": Stored("apertus", RMS),
    "ministral3": Stored("mistral3", RMS, {"rope.scaling.yarn_log_multiplier": 1.0}),
    "granitemoe": Stored("granitemoe", RMS | GRANITE | LOCAL, names={".router.weight": ".router.layer.weight"}),
}


def write_model_gguf(
    path: Path,
    model: PreTrainedModel,
    metadata: dict[str, object] | None = None,
    tensors: dict | None = None,
    packed: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> None:
    """A model's file, in float32, without a vocabulary.

    metadata, tensors: more, or others; None takes one away. packed: other types, by how names end.
    """
    config, stored = model.config, FILES[model.config.model_type]
    writer = gguf.GGUFWriter(path, stored.architecture)
    for key, value in (_metadata(config, stored) | _xielu(model) | (metadata or {})).items():
        if value is not None:
            add_value(writer, key, value)
    if config.rope_parameters.get("rope_type") == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    for name, values in (dict(_tensors(model, stored)) | (tensors or {})).items():
        kind = next((kind for end, kind in (packed or {}).items() if name.endswith(end)), None)
        if values is not None and kind is not None:
            writer.add_tensor(name, gguf.quants.quantize(values.contiguous().numpy(), kind), raw_dtype=kind)
        elif values is not None:
            writer.add_tensor(name, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: PretrainedConfig, stored: Stored) -> dict[str, object]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    if config.model_type == "gpt_neox":
        del values["attention.head_count_kv"]
    if config.model_type.startswith(("lfm2", "granitemoehybrid")):
        counts = [config.num_key_value_heads * (kind == "full_attention") for kind in config.layer_types]
        values["attention.head_count_kv"] = counts
    values |= {key: getattr(config, name) for key, name in stored.keys.items()}
    values |= stored.values | _positions(config, head_dim)
    if config.model_type == "granitemoehybrid" and config.num_local_experts:
        values |= {key: getattr(config, name) for key, name in LOCAL.items()}
        values["rope.scaling.finetuned"] = config.position_embedding_type == "rope"
    if hasattr(config, "mamba_d_head"):
        values["ssm.inner_size"] = config.mamba_n_heads * config.mamba_d_head
    if "attention.sliding_window" in values and config.model_type != "phi3":
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    if config.model_type == "ministral3":
        values["attention.temperature_scale"] = config.rope_parameters["llama_4_scaling_beta"]
    own = {f"{stored.architecture}.{key}": value for key, value in values.items()}
    return own | {"tokenizer.ggml.model": "none"}


def _xielu(model: PreTrainedModel) -> dict[str, object]:
    """Apertus' activations."""
    found: dict[str, object] = {}
    for key in ("alpha_n", "alpha_p", "beta", "eps"):
        values = [value.item() for name, value in model.state_dict().items() if name.endswith(f".act_fn.{key}")]
        found |= {f"xielu.{key}": values} if values else {}
    return found


def _positions(config: PretrainedConfig, head_dim: int) -> dict[str, object]:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    part = rope.get("partial_rotary_factor", 1.0)
    values = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": int(head_dim * part)}
    if rope["rope_type"] == "yarn":
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return values


def _tensors(model: PreTrainedModel, stored: Stored) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[stored.architecture], config.num_hidden_layers)
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for ours, theirs in stored.names.items():
            name = name.removesuffix(ours) + theirs if name.endswith(ours) else name
        if ".act_fn." in name:
            continue  # in the metadata
        if name.endswith(("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight")):
            yield from _of_shared_mlp(name, values, "_shexp" if config.num_local_experts else "")
            continue
        if ".experts." in name:
            yield from _of_experts(name, values, taking_turns=stored.architecture == "gpt-oss")
            continue
        base, _, kind = name.rpartition(".")
        found, whole = names.get_name(base), names.get_name(name)
        assert found or whole, f"{name} has no name in files"
        own = whole or f"{found}.{kind}"
        values = _with_factors(name, values, config) if config.model_type == "falcon_h1" else values
        yield own, _as_converted(own, values, config, stored.architecture)


def _of_shared_mlp(name: str, values: torch.Tensor, end: str) -> Iterator[tuple[str, torch.Tensor]]:
    block = f"blk.{name.split('.')[2]}"
    if name.endswith("output_linear.weight"):
        yield f"{block}.ffn_down{end}.weight", values
        return
    for kind, part in zip(("gate", "up"), values.chunk(2), strict=True):
        yield f"{block}.ffn_{kind}{end}.weight", part


def _with_factors(name: str, values: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Falcon-H1's factors are part of the weights in files."""
    into, state = config.attention_in_multiplier, config.mamba_n_groups * config.mamba_d_state
    inner = config.mamba_n_heads * config.mamba_d_head
    sizes = (inner, inner, state, state, config.mamba_n_heads)
    by_row = torch.cat([torch.full((n, 1), f) for n, f in zip(sizes, config.ssm_multipliers, strict=True)])
    factors = {
        ".down_proj.weight": config.mlp_multipliers[1],
        ".gate_proj.weight": config.mlp_multipliers[0],
        ".k_proj.weight": into * config.key_multiplier,
        ".q_proj.weight": into,
        ".v_proj.weight": into,
        ".o_proj.weight": config.attention_out_multiplier,
        ".out_proj.weight": config.ssm_out_multiplier,
        ".in_proj.weight": by_row * config.ssm_in_multiplier,
        "lm_head.weight": config.lm_head_multiplier,
        "embed_tokens.weight": config.embedding_multiplier,
    }
    return values * next((factor for end, factor in factors.items() if name.endswith(end)), 1.0)


def _of_experts(name: str, values: torch.Tensor, *, taking_turns: bool) -> Iterator[tuple[str, torch.Tensor]]:
    block = f"blk.{name.split('.')[2]}"
    if name.endswith("gate_up_proj"):
        gate, up = values.chunk(2, dim=1) if not taking_turns else (values[..., t::2].transpose(1, 2) for t in (0, 1))
        yield f"{block}.ffn_gate_exps.weight", gate
        yield f"{block}.ffn_up_exps.weight", up
    elif name.endswith("_bias"):
        kinds = {"gate": values[:, ::2], "up": values[:, 1::2]} if "gate_up" in name else {"down": values}
        yield from ((f"{block}.ffn_{kind}_exps.bias", own) for kind, own in kinds.items())
    else:
        yield f"{block}.ffn_down_exps.weight", values.transpose(1, 2) if taking_turns else values


def _as_converted(name: str, values: torch.Tensor, config: PretrainedConfig, architecture: str) -> torch.Tensor:
    if architecture in PAIRS and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)
    if architecture == "gptneox" and ".attn_qkv." in name:
        by_head = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
        return torch.cat([by_head[:, kind].flatten(0, 1) for kind in range(3)])
    if name.endswith(".ssm_a"):
        return -values.exp()[:, None]
    if name.endswith(".ssm_d"):
        return values[:, None]
    if name.endswith(".ssm_norm.weight"):
        return values.reshape(config.mamba_n_groups, -1)
    if architecture in ("gemma", "nemotron") and name.endswith("norm.weight"):
        return values + 1
    return (
        values.squeeze()
        if name.endswith(("ffn_gate_inp_shexp.weight", "shortconv.conv.weight", "ssm_conv1d.weight"))
        else values
    )
