"""Architectures of GGUF files whose tensors are found by looking at transformers' model, and what their settings mean.

What files say and how it is computed was taken from llama.cpp's converter (its folder `conversion/`) and its models
(`src/models/`); names of tensors come from the gguf package. Llama, Qwen2, Qwen3 and Gemma have entries in `families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transformers_patches.weights.gguf_schema import Metadata

RMS = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
MAY_BE_ZERO = ("leading_dense_block_count",)
MORE_LAYERS = "nextn_predict_layers"
MAMBA = {f"ssm.{name}" for name in ("conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count")}
ROTATED = "rope.scaling.finetuned"  # of Granite: false where positions are not rotated at all
TEMPERATURE, LOG_MULTIPLIER = "attention.temperature_scale", "rope.scaling.yarn_log_multiplier"  # of Ministral 3
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


@dataclass(frozen=True)
class Architecture:
    """What a file of one architecture says, and what it takes for granted. Keys are those after the architecture's name.

    model_type: transformers' name.
    rotary_pairs: rows of q and k lie in rotary pairs in the file, and in two halves of a head in transformers' model.
    norm_offset: what the converter adds to the weights of norms.
    qkv_by_kind: rows of one projection for q, k and v lie by kind in the file, and by head in transformers' model.
    partial_rotary: only a part of a head's dimensions may be rotated.
    epsilon: field of the config, and key, of what norms add to the variance.
    integers: field of the config -> key; the file must have it. Those in MAY_BE_ZERO may be 0.
    numbers: field -> key and what holds without it; None: 1 / √(dimensions of a head).
    flags: field -> key and what holds without it.
    present: field -> tensor of the first block that says it by being there.
    missing_heads: value of `layer_types` for layers whose number of heads for keys is 0; "" if all have as many.
    more_layers: the last blocks of a file may be for other uses than the next token.
    fixed: fields that are the same in all models.
    expected: key -> the only value that can be computed.
    more: other keys that are read.
    mamba: some layers are Mamba 2's; files have A = -exp(A_log).
    stacked: end of a weight's name -> the tensors of its block that are its rows, one after the other.
    by_layer: end of a weight's name -> key of a list, without the architecture's name, with its value in every layer.
    window: how many layers in a row have a sliding window before one has none, where a file doesn't say which have;
        1: all have; 0: windows are not known.
    """

    model_type: str
    rotary_pairs: bool = False
    norm_offset: float = 0.0
    qkv_by_kind: bool = False
    partial_rotary: bool = False
    epsilon: tuple[str, str] = RMS
    integers: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    flags: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    missing_heads: str = ""
    more_layers: bool = False
    fixed: Mapping[str, object] = field(default_factory=dict)
    expected: Mapping[str, object] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    mamba: bool = False
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_layer: Mapping[str, str] = field(default_factory=dict)
    window: int = 0

    @property
    def keys(self) -> set[str]:
        """All keys that are read for it, beside those of every architecture."""
        valued = {key for key, _ in (*self.numbers.values(), *self.flags.values())}
        windows = {WINDOW, PATTERN} if self.window else set()
        windows |= {MORE_LAYERS} if self.more_layers else set()
        windows |= MAMBA if self.mamba else set()
        valued |= {ROTATED} if self.missing_heads and self.mamba else set()
        return valued | windows | {*self.more, self.epsilon[1], *self.integers.values(), *self.expected}

    @property
    def has_experts(self) -> bool:
        return "expert_count" in self.integers.values()


_LAYER_NORM = "attention.layer_norm_epsilon"
_ATTENTION = {"attention_bias": "attn_q.bias"}
_BOTH = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}
_EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_LOCAL_EXPERTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_QWEN_EXPERTS = {**_EXPERTS, "moe_intermediate_size": "expert_feed_forward_length"}
_SOFTMAX = {"expert_gating_func": SOFTMAX}
_GRANITE = Architecture(
    "granite",
    rotary_pairs=True,
    numbers={
        "attention_multiplier": ("attention.scale", None),
        "embedding_multiplier": ("embedding_scale", 1.0),
        "residual_multiplier": ("residual_scale", 1.0),
        "logits_scaling": ("logit_scale", 1.0),
    },
    present=_BOTH,
    expected={ROTATED: True},
)
_GRANITE_HYBRID = replace(
    _GRANITE,
    model_type="granitemoehybrid",
    mamba=True,
    present=_ATTENTION,
    missing_heads="linear_attention",
    integers={"shared_intermediate_size": "expert_shared_feed_forward_length"},
    fixed={"num_local_experts": 0},
    expected={},
    stacked={
        ".shared_mlp.input_linear.weight": ("ffn_gate", "ffn_up"),
        ".shared_mlp.output_linear.weight": ("ffn_down",),
    },
)
_LFM2 = Architecture(
    "lfm2",
    epsilon=("norm_eps", RMS[1]),
    integers={"conv_L_cache": "shortconv.l_cache"},
    fixed={"block_auto_adjust_ff_dim": False},
    missing_heads="conv",
)
_OLMO2 = Architecture("olmo2", present=_ATTENTION)

ARCHITECTURES: dict[str, Architecture] = {
    "smollm3": Architecture("smollm3", rotary_pairs=True, present=_BOTH, fixed={"no_rope_layer_interval": 4}),
    "granite": _GRANITE,
    "olmo2": _OLMO2,
    "ernie4_5": Architecture("ernie4_5", present={"use_bias": "attn_q.bias"}),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", present=_ATTENTION),
    "seed_oss": Architecture("seed_oss", present={**_BOTH, "attention_out_bias": "attn_output.bias"}),
    "chatglm": Architecture("glm", partial_rotary=True, present=_ATTENTION),
    "glm4": Architecture("glm4", partial_rotary=True, present=_ATTENTION),
    "phi3": Architecture("phi3", partial_rotary=True, window=1),
    "nemotron": Architecture(
        "nemotron", norm_offset=1.0, partial_rotary=True, epsilon=("norm_eps", _LAYER_NORM), present=_BOTH
    ),
    "arcee": Architecture("arcee", rotary_pairs=True, present=_BOTH),
    "starcoder2": Architecture(
        "starcoder2",
        epsilon=("norm_epsilon", _LAYER_NORM),
        present={"use_bias": "attn_q.bias"},
        fixed={"sliding_window": 4096},  # of all its models; files do not say it
    ),
    "gptneox": Architecture(
        "gpt_neox",
        qkv_by_kind=True,
        partial_rotary=True,
        epsilon=("layer_norm_eps", _LAYER_NORM),
        flags={"use_parallel_residual": ("use_parallel_residual", True)},
        present={"attention_bias": "attn_qkv.bias"},
    ),
    "exaone4": Architecture("exaone4", window=4),
    "cohere2": Architecture(
        "cohere2",
        epsilon=("layer_norm_eps", _LAYER_NORM),
        numbers={"logit_scale": ("logit_scale", 0.0625)},
        present=_ATTENTION,
        window=4,
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", integers=_QWEN_EXPERTS, present=_ATTENTION, fixed={"norm_topk_prob": True}, expected=_SOFTMAX
    ),
    "qwen2moe": Architecture(
        "qwen2_moe",
        integers={**_QWEN_EXPERTS, "shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        present={"qkv_bias": "attn_q.bias"},
        fixed={"norm_topk_prob": False},
        expected=_SOFTMAX,
    ),
    "olmoe": Architecture("olmoe", integers=_EXPERTS, present=_ATTENTION, fixed={"norm_topk_prob": False}),
    "glm4moe": Architecture(
        "glm4_moe",
        partial_rotary=True,
        integers={
            "n_routed_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
            "n_shared_experts": "expert_shared_count",
            "first_k_dense_replace": "leading_dense_block_count",
            "n_group": "expert_group_count",
            "topk_group": "expert_group_used_count",
        },
        numbers={"routed_scaling_factor": ("expert_weights_scale", 1.0)},
        flags={"norm_topk_prob": ("expert_weights_norm", False)},
        present={**_ATTENTION, "use_qk_norm": "attn_q_norm.weight"},
        expected={"expert_gating_func": SIGMOID},
        more_layers=True,
    ),
    "lfm2": _LFM2,
    "lfm2moe": replace(
        _LFM2,
        model_type="lfm2_moe",
        integers={**_LFM2.integers, **_QWEN_EXPERTS, "num_dense_layers": "leading_dense_block_count"},
        fixed={"norm_topk_prob": True, "use_expert_bias": True, "routed_scaling_factor": 1.0},
        expected={"expert_gating_func": SIGMOID},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        integers={**_LOCAL_EXPERTS, "intermediate_size": "expert_feed_forward_length"},
        expected=_SOFTMAX,
        window=2,
    ),
    "granitehybrid": _GRANITE_HYBRID,
    "falcon-h1": Architecture(
        "falcon_h1",
        mamba=True,
        present=_BOTH,
        fixed={  # the converter multiplies the weights with all factors
            **{f"{name}_multiplier": 1.0 for name in ("lm_head", "embedding", "key", "attention_in", "attention_out")},
            "ssm_in_multiplier": 1.0,
            "ssm_out_multiplier": 1.0,
            "ssm_multipliers": [1.0] * 5,
            "mlp_multipliers": [1.0, 1.0],
            "mamba_norm_before_gate": False,
        },
    ),
    "apertus": Architecture(
        "apertus",
        present=_ATTENTION,
        by_layer={f".act_fn.{name}": f"xielu.{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")},
    ),
    "mistral3": Architecture("ministral3", rotary_pairs=True, more=(TEMPERATURE,), expected={LOG_MULTIPLIER: 1.0}),
    "granitemoe": replace(_GRANITE, model_type="granitemoe", integers=_LOCAL_EXPERTS),
}
_MIXTRAL = Architecture("mixtral", rotary_pairs=True, integers=_LOCAL_EXPERTS)
_GRANITE_HYBRID_EXPERTS = replace(
    _GRANITE_HYBRID,
    integers={**_GRANITE_HYBRID.integers, **_LOCAL_EXPERTS},
    fixed={},  # the output's name is known to the gguf package
    stacked={".shared_mlp.input_linear.weight": ("ffn_gate_shexp", "ffn_up_shexp")},
)
_OLMO3 = replace(_OLMO2, model_type="olmo3", window=4)
REFUSED = {  # architectures that could be read, but not rightly
    "bitnet": "files don't say which activation the model has (SiLU, ReLU²): use the checkpoint's folder",
    "gemma3n": "its projections between streams have other names and shapes there: use the checkpoint's folder",
    "gemma4": "its heads, windows and experts differ by layer there: use the checkpoint's folder",
    "qwen35": "its linear attention has another order of heads there: use the checkpoint's folder",
    "qwen35moe": "its linear attention has another order of heads there: use the checkpoint's folder",
}
_WITH_EXPERTS = {"llama": _MIXTRAL, "granitehybrid": _GRANITE_HYBRID_EXPERTS}

# Those that can be written, by model_type: llama.cpp's name, and the entry
WRITTEN = {
    architecture.model_type: (name, architecture)
    for name, architecture in (*ARCHITECTURES.items(), ("olmo2", _OLMO3))
    if not (architecture.has_experts or architecture.mamba or architecture.by_layer or architecture.more)
}


def architecture_of(metadata: Metadata) -> Architecture | None:
    """What is known of a file's architecture; None if it has an entry in `families.py`, or is unknown.

    Some share a name: Mixtral is a Llama with experts, OLMo 3 is an OLMo 2 with windows.
    """
    name, experts = metadata.architecture, metadata.integer(metadata.of_model("expert_count"), 0)
    if name in _WITH_EXPERTS and experts:
        return _WITH_EXPERTS[name]
    if name == "olmo2" and metadata.has(metadata.of_model(WINDOW)):
        return _OLMO3
    return ARCHITECTURES.get(name)
