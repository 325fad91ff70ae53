"""What a GGUF file says about a model that is written: the reverse of reading its config (gguf_config, gguf_settings, gguf_rope)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from transformers_patches.errors import PartInferError
from transformers_patches.families import FAMILIES, family_of
from transformers_patches.weights.gguf_architectures import PATTERN, WINDOW, WRITTEN, Architecture
from transformers_patches.weights.gguf_config import gguf_config
from transformers_patches.weights.gguf_rope import THETA

_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")  # of Gemma 2 and 3: fields and keys
# Fields of a config that change nothing in what is computed from tokens, or that stand in the file as tensors
_OF_NO_MATTER = {
    *(
        "dtype",
        "architectures",
        "model_type",
        "transformers_version",
        "_name_or_path",
        "use_cache",
        "initializer_range",
    ),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "residual_dropout", "embedding_dropout", "embd_pdrop"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "pretraining_tp", "rope_scaling", "rope_theta"),
    *("classifier_dropout", "classifier_dropout_prob", "id2label", "label2id", "chunk_size_feed_forward", "rotary_pct"),
    *(
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "problem_type",
        "is_encoder_decoder",
        "tie_encoder_decoder",
    ),
    *("max_window_layers", "use_sliding_window", "cache_implementation", "default_theta", "name_or_path"),
}
# What llama.cpp computes, as tried with its version of llama-cpp-python 0.3.36: windows, and the biases that fields switch on
_WINDOWED = ("gemma2", "gemma3_text", "olmo3", "cohere2")
_BIAS_FIELDS = ("attention_bias", "mlp_bias", "use_bias", "attention_out_bias")
_BIASED = {
    **dict.fromkeys(("llama", "granite", "nemotron"), ("attention_bias", "mlp_bias")),
    **dict.fromkeys(("seed_oss", "glm", "glm4", "gpt_neox"), ("attention_bias",)),
    "starcoder2": ("use_bias",),
}
_NEEDED = {
    "starcoder2": "use_bias",
    "gpt_neox": "attention_bias",
}  # models without these biases are refused by llama.cpp
_UNSAID = {"partial_rotary_factor": 1.0}  # of `rope_parameters`: what holds where they don't say
EPSILON = 1e-6  # relative, of numbers that are float32 in files


def architecture_for(config: PretrainedConfig) -> tuple[str, Architecture]:
    """llama.cpp's name of a model's architecture, and what it keeps otherwise. PartInferError if it can't be written."""
    family = FAMILIES.get(config.model_type)
    if family is not None and family.gguf is not None:
        pairs, offset = family.gguf.rotary_pairs, family.norm_offset
        return family.gguf.architecture, Architecture(config.model_type, rotary_pairs=pairs, norm_offset=offset)
    if config.model_type not in WRITTEN:
        known = sorted({*WRITTEN, *(name for name, other in FAMILIES.items() if other.gguf)})
        raise PartInferError(
            f"GGUF files can be written of {', '.join(known)} models, this one is {config.model_type}: llama.cpp's own "
            "convert_hf_to_gguf.py knows more"
        )
    return WRITTEN[config.model_type]


def settings_metadata(config: PretrainedConfig) -> dict[str, object]:
    """Metadata of a model's sizes, constants and positions, by key. PartInferError for positions that no file can say."""
    name, architecture = architecture_for(config)
    head_dim = head_size(config)
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    if architecture.qkv_by_kind:  # one projection has as many of all three
        kv_heads = config.num_attention_heads
    if architecture.missing_heads:
        kv_heads = [kv_heads * (kind != architecture.missing_heads) for kind in config.layer_types]
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": family_of(config).intermediate_size(config),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        architecture.epsilon[1]: float(getattr(config, architecture.epsilon[0])),
    }
    values |= {key: getattr(config, field) for field, key in architecture.integers.items()}
    values |= {key: float(getattr(config, field)) for field, (key, _) in architecture.numbers.items()}
    values |= {key: bool(getattr(config, field)) for field, (key, _) in architecture.flags.items()}
    values |= _windows(config, architecture) | _softcaps(config) | _positions(config, architecture, head_dim)
    return {f"{name}.{key}": value for key, value in values.items()}


def head_size(config: PretrainedConfig) -> int:
    """Dimensions of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(config: PretrainedConfig) -> np.ndarray | None:
    """What frequencies are divided by, float32 [head_dim / 2], where that is a tensor of the file; else None.

    Llama 3's scaling is not in the metadata. https://arxiv.org/abs/2407.21783
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    half = head_size(config) // 2
    frequencies = float(rope["rope_theta"]) ** -(np.arange(half, dtype=np.float64) / half)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def check_written(path: Path, config: PretrainedConfig) -> None:
    """Raise PartInferError unless the file means the model's own config: what it can't say llama.cpp would compute otherwise."""
    written, wanted = gguf_config(path).to_dict(), config.to_dict()
    for field in sorted((written.keys() & wanted.keys()) - _OF_NO_MATTER):
        if not _same(written[field], wanted[field]):
            raise PartInferError(
                f"a GGUF file can't say the model's {field} ({_short(wanted[field])}): llama.cpp computes "
                f"{config.model_type} models with {_short(written[field])}"
            )


def check_llama_cpp(config: PretrainedConfig) -> None:
    """Raise PartInferError for sliding windows and biases that llama.cpp does not have in such models."""
    kind, window = config.model_type, getattr(config, "sliding_window", None)
    used = window is not None and getattr(config, "use_sliding_window", True)
    if used and window < config.max_position_embeddings and kind not in _WINDOWED:
        raise PartInferError(f"llama.cpp has no sliding window for {kind} models, this one has one of {window} tokens")
    for field in _BIAS_FIELDS:
        if getattr(config, field, False) is True and field not in _BIASED.get(kind, ()):
            raise PartInferError(f"llama.cpp has no place for the biases of {kind} models ({field})")
    if kind in _NEEDED and not getattr(config, _NEEDED[kind]):
        raise PartInferError(f"llama.cpp computes {kind} models with biases, this one has none ({_NEEDED[kind]})")


def can_hold_ffn_bias(model_type: str) -> bool:
    """Whether llama.cpp adds biases of FFNs where the config has a switch for them."""
    return "mlp_bias" in _BIASED.get(model_type, ())


def _rope(config: PretrainedConfig) -> Mapping:
    """`rope_parameters` of layers that see everything."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _is_gemma(config: PretrainedConfig) -> bool:
    return config.model_type in ("gemma2", "gemma3_text")


def _positions(config: PretrainedConfig, architecture: Architecture, head_dim: int) -> dict[str, object]:
    rope = _rope(config)
    kind, part = rope["rope_type"], rope.get("partial_rotary_factor") or 1.0
    odd = {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"} & {
        name for name, value in rope.items() if value is not None
    }
    if kind not in ("default", "linear", "yarn", "llama3") or odd or (part != 1.0 and not architecture.partial_rotary):
        more = f" with {', '.join(sorted(odd))}" if odd else ""
        raise PartInferError(f"a GGUF file can't say the model's rope scaling ({kind}{more})")
    values = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": int(head_dim * part)}
    near = config.rope_parameters.get("sliding_attention")
    if config.model_type == "gemma3_text" and near is not None and near["rope_theta"] != THETA:
        values["rope.freq_base_swa"] = float(near["rope_theta"])
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        original = rope.get("original_max_position_embeddings")
        if kind == "yarn" and original:
            values["rope.scaling.original_context_length"] = original
    return values


def _windows(config: PretrainedConfig, architecture: Architecture) -> dict[str, object]:
    window = getattr(config, "sliding_window", None)
    if window is None or not (architecture.window or _is_gemma(config)):
        return {}
    listed = architecture.window > 1  # Gemma's pattern is fixed in llama.cpp
    pattern = {PATTERN: [kind == "sliding_attention" for kind in config.layer_types]} if listed else {}
    return {WINDOW: window} | pattern


def _softcaps(config: PretrainedConfig) -> dict[str, object]:
    caps = {name: getattr(config, name, None) for name in _SOFTCAPS} if _is_gemma(config) else {}
    return {name: float(value) for name, value in caps.items() if value}


def _same(written: object, wanted: object) -> bool:
    if isinstance(written, dict) and isinstance(wanted, dict):
        names = {name for name in written.keys() | wanted.keys() if wanted.get(name) is not None}
        return all(_same(written.get(name, _UNSAID.get(name)), wanted[name]) for name in names)
    if isinstance(written, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(written, wanted, rel_tol=EPSILON, abs_tol=1e-12)
    if isinstance(written, (list, tuple)) and isinstance(wanted, (list, tuple)):
        return len(written) == len(wanted) and all(map(_same, written, wanted))
    return written == wanted


def _short(value: object) -> str:
    return str(value)[:80]
