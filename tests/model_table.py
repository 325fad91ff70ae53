"""Every architecture that the project says it runs, with a tiny configuration: the tests go over it.

README's list of models and the table in docs/models.md come from it: `python -m tests.model_table` writes them.
"""

from __future__ import annotations

import copy
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.model_gguf import FILES
from transformers_patches.families import FAMILIES

LAYERS, HIDDEN, SIZE, VOCABULARY = 4, 32, 96, 128
COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": SIZE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # activations far from each other, so that selections are clear
}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 1.0,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}


@dataclass(frozen=True)
class Model:
    """One architecture.

    names: models that have it, for README.
    options: of its tiny config, beside COMMON.
    whole: layers that can't be computed by neurons.
    why_whole: why not, for the docs.
    down: the output projection of its FFN, in a layer.
    """

    names: str
    options: dict = field(default_factory=dict)
    whole: tuple[int, ...] = ()
    why_whole: str = ""
    down: str = "mlp.down_proj"

    @property
    def by_neurons(self) -> str:
        """Which layers can be computed by neurons, in words."""
        if self.experts and not self.sparse:
            return self.why_whole
        if not self.sparse:
            return f"no: {self.why_whole}"
        return f"yes; {self.why_whole}" if self.whole else "yes"

    @property
    def experts(self) -> bool:
        """Whether neurons are chosen inside of experts."""
        return WHY_EXPERTS in self.why_whole

    @property
    def sparse(self) -> bool:
        return len(self.whole) < LAYERS


EVERY = tuple(range(LAYERS))
MOE = {"num_experts_per_tok": 2, "num_experts": 6, "moe_intermediate_size": 32, "norm_topk_prob": True}
LOCAL = {"num_experts_per_tok": 2, "num_local_experts": 6}
WHY_EXPERTS = "neurons inside the chosen experts, for every token"
MODELS: dict[str, Model] = {
    "llama": Model("Llama 2 and 3, SmolLM2, TinyLlama"),
    "mistral": Model("Mistral 7B"),
    "qwen2": Model("Qwen2, Qwen2.5"),
    "qwen3": Model("Qwen3"),
    "gemma": Model("Gemma"),
    "gemma2": Model("Gemma 2"),
    "gemma3_text": Model("Gemma 3"),
    "smollm3": Model("SmolLM3", {"no_rope_layers": [1, 1, 1, 0]}),
    "granite": Model(
        "Granite 3",
        {
            "residual_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "rope_parameters": YARN,
        },
    ),
    "ministral": Model("Ministral 8B", SLIDING),
    "ministral3": Model("Ministral 3"),
    "olmo2": Model("OLMo 2"),
    "olmo3": Model("OLMo 3", SLIDING),
    "exaone4": Model("EXAONE 4", SLIDING),
    "ernie4_5": Model("ERNIE 4.5", {"use_bias": True}),
    "hunyuan_v1_dense": Model("Hunyuan dense"),
    "seed_oss": Model("Seed-OSS", {"rope_parameters": YARN}),
    "glm": Model("GLM-4 9B"),
    "glm4": Model("GLM-4 0414"),
    "phi3": Model("Phi-3, Phi-4-mini", {"sliding_window": 6}),
    "qwen3_5_text": Model("Qwen3.5", LINEAR_ATTENTION),
    "cohere2": Model("Command R7B", SLIDING),
    "falcon_h1": Model(
        "Falcon-H1", {**MAMBA, "mamba_d_ssm": 64, "mlp_multipliers": [0.7, 1.3]}, down="feed_forward.down_proj"
    ),
    "lfm2": Model(
        "LFM2",
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
        down="feed_forward.w2",
    ),
    "granitemoehybrid": Model(
        "Granite 4",
        {
            **MAMBA,
            "shared_intermediate_size": SIZE,
            "num_local_experts": 0,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "residual_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
        down="shared_mlp.output_linear",
    ),
    "nemotron": Model("Nemotron, Minitron"),
    "arcee": Model("Arcee AFM"),
    "nanochat": Model("nanochat", down="mlp.fc2"),
    "apertus": Model("Apertus"),
    "gpt_neox": Model("Pythia, GPT-NeoX", down="mlp.dense_4h_to_h"),
    "starcoder2": Model("StarCoder2", {"sliding_window": 6}, down="mlp.c_proj"),
    "gemma3n_text": Model(
        "Gemma 3n",
        {
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 6,
            "intermediate_size": [SIZE] * LAYERS,
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        whole=(0, 1),
        why_whole="layers that cut activations themselves read what is left",
    ),
    "gemma4_text": Model(
        "Gemma 4",
        {
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
            **SLIDING,
        },
    ),
    "bitnet": Model("BitNet", whole=EVERY, why_whole="its FFN normalises over all neurons"),
    "qwen3_moe": Model("Qwen3-30B-A3B", MOE, whole=EVERY, why_whole=WHY_EXPERTS),
    "qwen2_moe": Model(
        "Qwen1.5-MoE", {**MOE, "shared_expert_intermediate_size": 64}, whole=EVERY, why_whole=WHY_EXPERTS
    ),
    "olmoe": Model("OLMoE", MOE, whole=EVERY, why_whole=WHY_EXPERTS),
    "mixtral": Model("Mixtral", LOCAL, whole=EVERY, why_whole=WHY_EXPERTS),
    "granitemoe": Model("Granite 3 MoE", {**LOCAL, "residual_multiplier": 0.3}, whole=EVERY, why_whole=WHY_EXPERTS),
    "qwen3_5_moe_text": Model(
        "Qwen3.5-35B-A3B",
        {**MOE, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 64},
        whole=EVERY,
        why_whole=WHY_EXPERTS,
    ),
    "glm4_moe": Model(
        "GLM-4.5",
        {
            **MOE,
            "n_routed_experts": 6,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 2,
        },
        whole=(2, 3),
        why_whole=f"in layers with experts {WHY_EXPERTS}",
    ),
    "lfm2_moe": Model(
        "LFM2-8B-A1B",
        {**MOE, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
        whole=(2, 3),
        why_whole=f"in layers with experts {WHY_EXPERTS}",
        down="feed_forward.w2",
    ),
    "gpt_oss": Model("gpt-oss in 16 bits", {**LOCAL, **SLIDING}, whole=EVERY, why_whole=WHY_EXPERTS),
}
# What else configs of these architectures may say: name, model_type and more options.
YARN_ALONE = {key: value for key, value in YARN.items() if key != "partial_rotary_factor"}
BIASES = {"attention_bias": True, "mlp_bias": True}
WINDOW = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 32}
VARIANTS: dict[str, tuple[str, dict]] = {
    "llama, RoPE of Llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, biases": ("llama", BIASES),
    "qwen2, windows in some layers": ("qwen2", WINDOW),
    "qwen3_moe, YaRN": ("qwen3_moe", {"rope_parameters": YARN_ALONE}),
    "qwen3_moe, windows in some layers": ("qwen3_moe", WINDOW),
    "qwen3_moe, dense layers": ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
    "qwen3_moe, experts in every second layer": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "qwen2_moe, a dense layer": ("qwen2_moe", {"mlp_only_layers": [0]}),
    "mixtral, windows": ("mixtral", {"sliding_window": 6}),
    "olmoe, clipped": ("olmoe", {"clip_qkv": 1.0}),
    "glm4_moe, norms of q and k": ("glm4_moe", {"use_qk_norm": True}),
    "phi3, LongRoPE": (
        "phi3",
        {
            "hidden_size": 64,
            "head_dim": 16,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "rope_parameters": LONG,
        },
    ),
    "glm4, dynamic RoPE": ("glm4", {"rope_parameters": DYNAMIC}),
    "nemotron, biases": ("nemotron", BIASES),
    "seed_oss, biases": ("seed_oss", {**BIASES, "attention_out_bias": True}),
    "smollm3, biases": ("smollm3", BIASES),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon_h1, biases and a norm": (
        "falcon_h1",
        {**BIASES, "projectors_bias": True, "mamba_rms_norm": True},
    ),
    "lfm2, its own size": ("lfm2", {"block_auto_adjust_ff_dim": True, "block_multiple_of": 32}),
    "granitemoehybrid, experts": ("granitemoehybrid", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "granitemoehybrid, attention": (
        "granitemoehybrid",
        {"layer_types": ["full_attention"] * LAYERS, "position_embedding_type": "rope"},
    ),
    "gemma3n, sizes by layer": (
        "gemma3n_text",
        {"intermediate_size": [SIZE, SIZE, 128, SIZE], "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    ),
    "gemma3n, shared keys": ("gemma3n_text", {"num_kv_shared_layers": 2}),
    "gemma4, experts": ("gemma4_text", GEMMA4_EXPERTS),
    "gemma4, twice as wide": ("gemma4_text", {"use_double_wide_mlp": True, "num_kv_shared_layers": 2}),
    "gemma4, keys as values": (
        "gemma4_text",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 16},
    ),
    "gemma4, embeddings once": ("gemma4_text", {"hidden_size_per_layer_input": 0}),
}


def tiny_model(model_type: str, options: dict | None = None) -> PreTrainedModel:
    """A seeded random model in float32; biases, norms and other vectors are random too, so that nothing is untested.

    options: of its config, beside those of the table.
    """
    given = copy.deepcopy({**COMMON, **MODELS[model_type].options, **(options or {})})  # some configs change theirs
    config = AutoConfig.for_model(model_type, **given)
    torch.manual_seed(list(MODELS).index(model_type))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in (*model.parameters(), *model.buffers()):
            if parameter.ndim == 1 and parameter.numel() in (HIDDEN, SIZE, 8):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def readme_list() -> str:
    """The models by name, as README has them."""
    models = MODELS.values()
    kinds = {
        "By neurons": [model for model in models if model.sparse],
        "By neurons inside the chosen experts": [model for model in models if model.experts and not model.sparse],
        "Dense only": [model for model in models if not model.sparse and not model.experts],
    }
    text = " ".join(f"{kind}: {', '.join(model.names for model in some)}." for kind, some in kinds.items())
    return "\n".join(textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False))


def docs_table() -> str:
    """The architectures, as docs/models.md has them."""
    rows = ["| models | `model_type` | GGUF | native decoder | by neurons |", "|---|---|---|---|---|"]
    for model_type, model in MODELS.items():
        family = FAMILIES.get(model_type)
        stored = family.gguf if family is not None and family.gguf is not None else FILES.get(model_type)
        file = "" if stored is None else f"`{stored.architecture}`"
        native = "yes" if family is not None and family.native_decoder else ""
        rows.append(f"| {model.names} | `{model_type}` | {file} | {native} | {model.by_neurons} |")
    return "\n".join(rows)


WRITTEN = {"README.md": readme_list, "docs/models.md": docs_table}


def with_list(text: str, content: str) -> str:
    """A document with the generated part replaced."""
    pattern = r"(<!-- models: begin -->\n).*?(\n<!-- models: end -->)"
    return re.sub(pattern, lambda match: match[1] + content + match[2], text, flags=re.DOTALL)


def main() -> None:
    root = Path(__file__).parent.parent
    for name, make in WRITTEN.items():
        path = root / name
        path.write_text(with_list(path.read_text(encoding="utf-8"), make()), encoding="utf-8")


if __name__ == "__main__":
    main()
