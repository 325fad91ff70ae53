"""Typed access to a GGUF file's metadata, and what is said about keys that nobody understands."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any

import numpy as np

from transformers_patches.errors import PartInferError
from transformers_patches.flags import IGNORE_FLAG, IGNORED_GGUF_KEYS
from transformers_patches.weights.gguf_file import GGUFFile

_REQUIRED = object()

# What is read, without the architecture's name in front
_UNDERSTOOD = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.causal",
    "expert_count",
    "expert_used_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_UNDERSTOOD_BY_GEMMA = {
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "final_logit_softcapping",
    "rope.freq_base_swa",
}
_UNDERSTOOD_ONLY_BY = {"gemma2": _UNDERSTOOD_BY_GEMMA | {"attn_logit_softcapping"}, "gemma3": _UNDERSTOOD_BY_GEMMA}
# What cannot change a token: how the file was made, and what llama.cpp reads for other uses (embeddings) only
_HARMLESS = {"rope.scaling.finetuned", "tensor_data_layout", "pooling_type", "attention.layer_norm_epsilon"}
_TOKENIZER = {
    *("ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.scores", "ggml.merges"),
    *("ggml.bos_token_id", "ggml.eos_token_id", "ggml.eot_token_id", "ggml.eom_token_id", "ggml.eos_token_ids"),
    *("ggml.unknown_token_id", "ggml.padding_token_id", "ggml.fim_pad_token_id", "ggml.fim_rep_token_id"),
    *("ggml.fim_sep_token_id", "ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_space_prefix"),
    *("ggml.suppress_tokens", "chat_template", "chat_templates"),
}
# Of tokenizers that can't be read here (WordPiece, Unigram, RWKV), or without a use in generation
_TOKENIZER_HARMLESS = {
    *(
        "ggml.token_type_count",
        "ggml.seperator_token_id",
        "ggml.cls_token_id",
        "ggml.mask_token_id",
        "ggml.add_sep_token",
    ),
    *(
        "ggml.remove_extra_whitespaces",
        "ggml.precompiled_charsmap",
        "ggml.added_tokens",
        "huggingface.json",
        "rwkv.world",
    ),
    *("ggml.normalizer.lowercase", "ggml.normalizer.strip_accents"),
    *("ggml.fim_pre_token_id", "ggml.fim_suf_token_id", "ggml.fim_mid_token_id"),
    *("ggml.prefix_token_id", "ggml.suffix_token_id", "ggml.middle_token_id"),
}
_TEMPLATE = "tokenizer.chat_template."  # and the name of one that is not the default


class Metadata:
    """A file's metadata, checked where they are read: PartInferError names the file, the key, and what is expected."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = self.text("general.architecture")
        kind = self.text("general.type", "model")
        if kind != "model":
            raise PartInferError(f"{file.path} holds no model: its general.type is {kind[:80]!r}")

    def error(self, key: str, expected: str) -> PartInferError:
        given = str(self.file.metadata.get(key))
        return PartInferError(f"{self.file.path}: {key} must be {expected}, got {' '.join(given.split())[:80]!r}")

    def of_model(self, name: str) -> str:
        """The key of an architecture's own setting."""
        return f"{self.architecture}.{name}"

    def has(self, key: str) -> bool:
        return key in self.file.metadata and key not in IGNORED_GGUF_KEYS

    def _value(self, key: str, default: Any) -> Any:
        if self.has(key):
            return self.file.metadata[key]
        if default is _REQUIRED:
            raise PartInferError(f"{self.file.path} has no {key}: it is damaged, or no language model")
        return default

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self._value(key, default)
        if value is not default and not isinstance(value, str):
            raise self.error(key, "a text")
        return value

    def texts(self, key: str, default: Any = _REQUIRED) -> list[str]:
        value = self._value(key, default)
        if value is not default and not isinstance(value, list):
            if isinstance(value, np.ndarray) and not len(value):
                return []
            raise self.error(key, "a list of texts")
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self._value(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 0, high: int = 2**31 - 1) -> int:
        """A number, or an array whose numbers are all the same: one for every layer."""
        value = self._value(key, default)
        if value is default:
            return value
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}, the same for all layers")
        return value

    def number(self, key: str, default: Any = _REQUIRED, low: float = 0.0) -> float:
        """A finite number from `low` on. GGUF keeps float32: 9.999999747378752e-06 was 1e-05 in the original config."""
        value = self._value(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
            raise self.error(key, f"a number, {low} or more")
        return float(str(np.float32(value)))

    def numbers(self, key: str, length: int | None = None) -> np.ndarray | None:
        """An array of numbers, of at least `length` if that is given; None if it is not there."""
        value = self._value(key, None)
        if value is not None and (not isinstance(value, np.ndarray) or (length is not None and len(value) < length)):
            raise self.error(key, "a list of numbers" if length is None else f"a list of {length} numbers")
        return value

    def check_keys(self, more: Set[str] = frozenset()) -> None:
        """Raise PartInferError for a key that could change what the model says and that nobody reads.

        more: those that are read for its architecture, without its name in front.
        """
        own = more | _UNDERSTOOD | _HARMLESS | _UNDERSTOOD_ONLY_BY.get(self.architecture, set())
        for key in self.file.metadata:
            space, _, rest = key.partition(".")
            if space == self.architecture:
                known = rest in own
            elif space == "tokenizer":
                known = rest in _TOKENIZER | _TOKENIZER_HARMLESS or key.startswith(_TEMPLATE)
            else:
                known = not (".rope." in key or ".attention." in key or key.startswith("general.tensor_extra"))
            if not known and key not in IGNORED_GGUF_KEYS:
                raise PartInferError(
                    f"{self.file.path} sets {key[:120]}, which is not understood and could change the output: "
                    f"{IGNORE_FLAG} {key[:120]} goes on without it"
                )

    def refuse(self, key: str, why: str) -> None:
        """Raise PartInferError for a key whose value can't be followed."""
        value = " ".join(str(self.file.metadata[key]).split())[:40]
        raise PartInferError(f"{self.file.path} sets {key} to {value}: {why}; {IGNORE_FLAG} {key} goes on without it")


def named_templates(metadata: Metadata) -> dict[str, str]:
    """The chat templates beside the default one, by name."""
    keys = [key for key in metadata.file.metadata if key.startswith(_TEMPLATE)]
    return {key.removeprefix(_TEMPLATE): metadata.text(key) for key in keys if metadata.has(key)}
