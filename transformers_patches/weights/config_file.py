"""config.json: read once, its values checked before transformers builds anything from them.

transformers checks the types of most values itself; what it leaves open is checked here: sizes without a bound, which
would fill memory, names of types, numbers that are not finite, and settings that change what is computed without being
supported.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import PretrainedConfig

from transformers_patches.errors import PartInferError

LARGEST_BYTES = 16 * 2**20  # of the file
LARGEST = {  # what no model reaches
    "num_hidden_layers": 10_000,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "ffn_dim": 2**24,
    "word_embed_proj_dim": 2**20,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "vocab_size": 2**28,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
}
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "do_layer_norm_before")
RANGES = {  # from, to
    **dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), (1e-6, 1e9)),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "layerdrop"), (0, 1)),
}
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPS = ("rope_parameters", "rope_scaling")  # objects with numbers of their own
_UNSUPPORTED = {  # what a value must be if it is there, and why
    "return_dict": (True, "PartInfer reads outputs by their names"),
    "quantization_config": (None, "PartInfer quantises itself: give the model without quantisation"),
    "transformers_weights": (None, "weights are read from model.safetensors or the shards of its index"),
}


def read_config_file(folder: Path) -> dict:
    """The content of a folder's config.json; PartInferError, naming file and value, for what can't be used."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"it has more than {LARGEST_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
    except RecursionError:
        raise PartInferError(f"{path} can't be read: it is nested too deep; fetch the model again") from None
    except (OSError, ValueError) as error:
        raise PartInferError(f"{path} can't be read: {one_line(error)}; fetch the model again") from None
    for name, value in content.items():
        reason = _why_wrong(name, value)
        if reason:
            raise PartInferError(f"{path}: {name} is {_shown(value)}, {reason}")
    return content


def check_config(config: PretrainedConfig, path: Path) -> PretrainedConfig:
    """Check a config as transformers completed it, and return it.

    Raises PartInferError for missing sizes, and for a type that weights can't have.
    """
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        value = getattr(config, name, None)
        if type(value) is not int or value < 1:
            raise PartInferError(f"{path}: {name} is {_shown(value)}, expected a whole number of at least 1")
    if config.dtype is not None and config.dtype not in FLOAT_TYPES:
        raise PartInferError(f"{path}: dtype is {config.dtype}, {_types()}")
    return config


def one_line(error: BaseException) -> str:
    """The message of another library's exception, in one line for a message of our own."""
    text = str(error).split(". ")[0]
    return " ".join(text.split())[:300] or type(error).__name__


def _why_wrong(name: str, value: object) -> str | None:
    if name in _UNSUPPORTED:
        right, why = _UNSUPPORTED[name]
        return None if value is None or value is right else f"but {why}"
    if name == "text_config" and isinstance(value, dict):
        wrong = next(((key, reason) for key, inner in value.items() if (reason := _why_wrong(key, inner))), None)
        return f"but its {wrong[0]} is {_shown(value[wrong[0]])}, {wrong[1]}" if wrong else None
    if name in LARGEST and value is not None:  # null: transformers says what follows
        sizes = value if name == "intermediate_size" and isinstance(value, list) else [value]  # one for each layer
        least = 0 if name == "sliding_window" else 1  # 0: none
        wrong = not all(type(size) is int and least <= size <= LARGEST[name] for size in sizes)
        return f"expected a whole number from {least} to {LARGEST[name]}" if wrong else None
    if name in FLAGS:
        return None if isinstance(value, bool) else "expected true or false, without quotes"
    if name in RANGES and value is not None:
        low, high = RANGES[name]
        right = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"expected a number from {low:g} to {high:g}"
    if name in ("dtype", "torch_dtype") and value is not None:
        known = isinstance(value, str) and getattr(torch, value, None) in FLOAT_TYPES
        return None if known else _types()
    if name in _GROUPS and isinstance(value, dict):
        wrong = next((key for key, number in value.items() if _is_not_finite(number)), None)
        return f"but {wrong} in it is not finite" if wrong is not None else None
    return "expected a finite number" if _is_not_finite(value) else None


def _types() -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in FLOAT_TYPES]
    return f"expected one of {', '.join(names)}: correct it, or remove it to take the type of the weights"


def _is_not_finite(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(number, float) and not math.isfinite(number) for number in values)


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}…"
