"""Rotary position embeddings of a GGUF file, as transformers' `rope_parameters`.

What llama.cpp computes: angle = position · θ^(-2i/d) / (factor · factors_i), where YaRN takes the slow dimensions only;
cosine and sine are multiplied by the attention factor. https://arxiv.org/abs/2306.15595 (linear),
https://arxiv.org/abs/2309.00071 (YaRN), https://arxiv.org/abs/2402.13753 (LongRoPE).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf_schema import Metadata

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (FREQUENCIES, LONG, SHORT)  # what frequencies are divided by; no weights of the model
THETA = 10000.0  # where a file does not say
KINDS = ("none", "linear", "yarn", "longrope")
# Llama 3.1 and 3.2: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


def rope_parameters(
    metadata: Metadata, head_dim: int, factors: dict[str, np.ndarray], *, partial: bool = False
) -> dict[str, Any]:
    """The `rope_parameters` of layers that see everything.

    factors: those of FACTOR_TENSORS that are there. partial: a part of a head's dimensions may be rotated, the first ones.

    Raises PartInferError for what transformers' models can't compute: another rotary width than the head's, YaRN with
    settings that llama.cpp does not read for these architectures.
    """
    dimensions = metadata.of_model("rope.dimension_count")
    rotated = metadata.integer(dimensions, head_dim, low=2)
    if rotated != head_dim and (not partial or rotated > head_dim or rotated % 2):
        metadata.refuse(dimensions, f"only all {head_dim} dimensions of a head can be rotated")
    part = {"partial_rotary_factor": rotated / head_dim} if partial else {}
    return part | _scaling(metadata, rotated, factors)


def _scaling(metadata: Metadata, rotated: int, factors: dict[str, np.ndarray]) -> dict[str, Any]:
    """`rope_parameters`, but for how many dimensions are rotated."""
    theta = metadata.number(metadata.of_model("rope.freq_base"), THETA, low=1.0)
    both = LONG in factors and SHORT in factors and metadata.architecture == "phi3"  # whose converter says no type
    kind = metadata.text(metadata.of_model("rope.scaling.type"), "longrope" if both else "linear")
    if kind not in KINDS:
        raise metadata.error(metadata.of_model("rope.scaling.type"), f"one of {', '.join(KINDS)}")
    factor = 1.0 if kind == "none" else _factor(metadata)
    attention = metadata.number(metadata.of_model("rope.scaling.attn_factor"), 1.0)
    context = metadata.integer(metadata.of_model("context_length"), low=1)
    original = metadata.integer(metadata.of_model("rope.scaling.original_context_length"), context, low=1)
    _check_yarn(metadata, factor)
    divisors = _divisors(metadata, kind, factors, rotated // 2)
    if kind == "yarn":
        if divisors is not None:
            raise PartInferError(
                f"{metadata.file.path} has both YaRN and {FREQUENCIES}, which can't be computed together"
            )
        return _yarn(theta, factor, original, attention)
    if divisors is None and attention == 1.0:
        if factor == 1.0:
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    short, long = (np.ones(rotated // 2, np.float32),) * 2 if divisors is None else divisors
    if factor == attention == 1.0 and (known := _llama3(theta, short, long)):
        return known
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "attention_factor": attention,
        "short_factor": [float(value) * factor for value in short],
        "long_factor": [float(value) * factor for value in long],
        "original_max_position_embeddings": original,
    }


def gemma_rope_parameters(metadata: Metadata, parameters: dict[str, Any]) -> dict[str, Any]:
    """The `rope_parameters` of Gemma 2 and 3.

    Gemma 2 has the same for all layers. Layers of Gemma 3 with a window have a base of their own and no scaling.
    """
    window_base = metadata.of_model("rope.freq_base_swa")
    kind, factor = parameters["rope_type"], parameters.get("factor", 1.0)
    if kind not in ("default", "linear"):
        raise PartInferError(
            f"{metadata.file.path}: {kind} scaling of {metadata.architecture} can't be computed, linear can"
        )
    if metadata.architecture == "gemma2":
        if metadata.number(window_base, parameters["rope_theta"], low=1.0) != parameters["rope_theta"]:
            metadata.refuse(window_base, "Gemma 2 has one base for all layers")
        if metadata.text(metadata.of_model("rope.scaling.type"), "") == "none" and _factor(metadata) != factor:
            metadata.refuse(metadata.of_model("rope.scaling.type"), "there is a factor of scaling all the same")
        return parameters
    local = metadata.number(window_base, THETA, low=1.0)
    return {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _factor(metadata: Metadata) -> float:
    """The factor as llama.cpp takes it: the current key's, else the old key's; 0 means that there is none."""
    key = metadata.of_model("rope.scaling.factor")
    key = key if metadata.has(key) else metadata.of_model("rope.scale_linear")
    return metadata.number(key, 1.0) or 1.0


def _check_yarn(metadata: Metadata, factor: float) -> None:
    """Refuse settings that llama.cpp does not read for these architectures: the original model may have meant them."""
    expected = {"ext_factor": 1.0, "attn_factor": _magnitude(factor), "beta_fast": 32.0, "beta_slow": 1.0}
    for name, value in expected.items():
        key = metadata.of_model(f"rope.scaling.yarn_{name}")
        given = metadata.number(key, value, low=-math.inf)
        if not math.isclose(given, value, rel_tol=1e-5) and not (name == "ext_factor" and given < 0):
            metadata.refuse(key, f"llama.cpp computes this architecture with {value:g} whatever it says")


def _magnitude(factor: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * math.log(factor) + 1.0


def _yarn(theta: float, factor: float, original: int, attention: float) -> dict[str, Any]:
    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    return parameters if attention == 1.0 else parameters | {"attention_factor": _magnitude(factor) * attention}


def _divisors(
    metadata: Metadata, kind: str, factors: dict[str, np.ndarray], half: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """For short and for long contexts: [d/2] each."""
    needed = (SHORT, LONG) if kind == "longrope" else (FREQUENCIES,)
    if strange := factors.keys() - set(needed):
        raise PartInferError(
            f"{metadata.file.path} has {min(strange)}, which does not go with rope.scaling.type {kind}"
        )
    if kind == "longrope" and (missing := set(needed) - factors.keys()):
        raise PartInferError(
            f"{metadata.file.path} has rope.scaling.type longrope but no {min(missing)}: fetch it again"
        )
    if not factors:
        return None
    for name, values in factors.items():
        if values.shape != (half,) or not np.isfinite(values).all() or (values <= 0).any():
            raise PartInferError(f"{metadata.file.path}: {name} must hold {half} positive numbers: fetch it again")
    return factors[needed[0]], factors[needed[-1]]


def _llama3(theta: float, short: np.ndarray, long: np.ndarray) -> dict[str, Any] | None:
    """Llama 3's scaling, if the divisors come from it: then the config says what the original one does."""
    if not np.array_equal(short, long):
        return None
    frequencies = theta ** -(np.arange(0, 2 * len(short), 2, dtype=np.float64) / (2 * len(short)))
    turns = 1 / (2 * math.pi / frequencies)
    for factor, low, high, original in _LLAMA3:
        smooth = np.clip((original * turns - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), short, rtol=1e-5):
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            values = dict(zip(names, (factor, low, high, original), strict=True))
            return {"rope_type": "llama3", "rope_theta": theta} | values
    return None
