"""The generation config that comes with a model: what the decoding loop honours is checked and used, the rest named."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from transformers_patches.errors import PartInferError

logger = logging.getLogger(__name__)

FILE = "generation_config.json"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(_is_id(item) for item in value)


def _are_texts(value: object) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in texts)


Check = tuple[Callable[[Any], bool], str]

ONE_ID: Check = (_is_id, "a token id")
IDS: Check = (lambda v: _is_id(v) or _are_ids(v), "a token id or a list of some")
ID_LIST: Check = (_are_ids, "a list of token ids")
ID_LISTS: Check = (
    lambda v: isinstance(v, list) and all(_are_ids(ids) and ids for ids in v),
    "a list of lists of token ids",
)
BIASES: Check = (
    lambda v: (
        isinstance(v, list)
        and all(isinstance(p, list) and len(p) == 2 and _are_ids(p[0]) and p[0] and _is_number(p[1]) for p in v)
    ),
    "a list of pairs of token ids and a number",
)
DECAY: Check = (
    lambda v: isinstance(v, list) and len(v) == 2 and _is_count(v[0]) and _is_number(v[1]) and v[1] > 0,
    "a pair of a count and a number above 0",
)
COUNT: Check = (_is_count, "a whole number from 0 on")
ABOVE_0: Check = (lambda v: _is_number(v) and v > 0, "a number above 0")
FRACTION: Check = (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
PROBABILITY: Check = (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, at most 1")
CUTOFF: Check = (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
SWITCH: Check = (lambda v: isinstance(v, bool), "true or false")
TEXTS: Check = (_are_texts, "a text or a list of texts, none of them empty")

# What transformers' logits processors and stopping criteria do for one sequence, and what the values must be
TAKEN: dict[str, Check] = {
    "bos_token_id": ONE_ID,
    "pad_token_id": ONE_ID,
    "eos_token_id": IDS,
    "forced_bos_token_id": ONE_ID,
    "forced_eos_token_id": IDS,
    "suppress_tokens": ID_LIST,
    "begin_suppress_tokens": ID_LIST,
    "bad_words_ids": ID_LISTS,
    "sequence_bias": BIASES,
    "repetition_penalty": ABOVE_0,
    "encoder_repetition_penalty": ABOVE_0,
    "no_repeat_ngram_size": COUNT,
    "encoder_no_repeat_ngram_size": COUNT,
    "exponential_decay_length_penalty": DECAY,
    "min_length": COUNT,
    "min_new_tokens": COUNT,
    "max_time": ABOVE_0,
    "min_p": FRACTION,
    "top_h": PROBABILITY,
    "typical_p": PROBABILITY,
    "epsilon_cutoff": CUTOFF,
    "eta_cutoff": CUTOFF,
    "renormalize_logits": SWITCH,
    "remove_invalid_values": SWITCH,
    "stop_strings": TEXTS,
}
# Not the model's to decide here: flags do, or it concerns what generate() returns, or models with an encoder
ELSEWHERE = {"do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "transformers_version"}
ELSEWHERE |= {"output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"}
ELSEWHERE |= {"decoder_start_token_id", "_from_model_config"}


def own_generation_config(
    folder: Path, made: GenerationConfig, vocabulary: int
) -> tuple[GenerationConfig, tuple[str, ...]]:
    """A model's generation config without what is not honoured, and its stop strings.

    folder: may hold a generation_config.json.
    made: what transformers made of config.json, used if that file is missing.
    vocabulary: number of tokens.

    What is left out, and could make a difference, is named in one warning. Raises PartInferError for a damaged file and
    for values of a wrong type or out of range.
    """
    path = folder / FILE
    content = _read(path) if path.is_file() else made.to_dict()
    source = str(path) if path.is_file() else str(folder)
    given = {name: value for name, value in content.items() if value is not None}
    taken = {name: value for name, value in given.items() if name in TAKEN}
    for name, value in taken.items():
        check, expected = TAKEN[name]
        if not check(value):
            raise PartInferError(f"{source}: {name} must be {expected}, got {value!r:.60}: mend it or take it out")
    _check_ids(taken, vocabulary, source)
    stop = taken.pop("stop_strings", [])
    usual = GenerationConfig._get_default_generation_params()
    known = GenerationConfig().to_dict().keys() | usual.keys()
    others = [n for n, v in given.items() if n in known - TAKEN.keys() - ELSEWHERE and v != usual.get(n, False)]
    if others:
        logger.warning("%s: not used here: %s", source, ", ".join(others))
    return GenerationConfig(**taken), tuple([stop] if isinstance(stop, str) else stop)


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise PartInferError(f"{path} can't be read: {reason}; fetch the model again") from None
    if not isinstance(content, dict):
        raise PartInferError(f"{path}: expected names and values, got {type(content).__name__}; fetch the model again")
    return content


def _check_ids(taken: dict, vocabulary: int, source: str) -> None:
    """Drop end, begin and padding ids that belong to no token (-1 is usual); PartInferError for others out of range."""
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        ids = taken.get(name, [])
        right = [i for i in (ids if isinstance(ids, list) else [ids]) if 0 <= i < vocabulary]
        taken.pop(name, None)
        if right:
            taken[name] = right if isinstance(ids, list) else right[0]
    for name in ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        _check_range(name, taken.get(name, []), vocabulary, source)
    for ids in taken.get("bad_words_ids", []):
        _check_range("bad_words_ids", ids, vocabulary, source)
    for ids, _ in taken.get("sequence_bias", []):
        _check_range("sequence_bias", ids, vocabulary, source)


def _check_range(name: str, ids: int | list[int], vocabulary: int, source: str) -> None:
    wrong = [i for i in (ids if isinstance(ids, list) else [ids]) if not 0 <= i < vocabulary]
    if wrong:
        raise PartInferError(f"{source}: {name} has {wrong[0]}, but the model's token ids are 0 to {vocabulary - 1}")
