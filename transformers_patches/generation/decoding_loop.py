"""transformers' sampling loop for one sequence, without what only batches and other models need.

A token of a small model takes 3 ms. Preparing inputs and masks that are not used, and checking whether to stop, took
another 0.7 ms. generate() still prepares everything (settings, logits processors, stopping criteria, the streamer) and
runs this loop as its `custom_generate`; for anything else, transformers' own loop runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from transformers_patches.errors import PartInferError
from transformers_patches.fast_pass.kv_cache import GrowingCache
from transformers_patches.fast_pass.one_token import OneTokenPass, one_token_pass
from transformers_patches.fast_pass.recorded_pass import RecordedPass, recorded_pass
from transformers_patches.kernels import SOFTMAX, Needed
from transformers_patches.sparse.request import RequestState
from transformers_patches.token_ids import NOT_FINITE

# For top-p sampling, in nats: only the least likely tokens stay rough, and top-p leaves those out
NUCLEUS_TOLERANCE = 5e-3


def one_sequence_loop(
    model: PreTrainedModel,
    state: RequestState,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    batch: int,
    options: dict,
) -> Callable[..., torch.Tensor] | None:
    """What generate() takes as `custom_generate`, or None where transformers' own loop is to run.

    config, streamer, batch: those of the call to come.
    options: its other arguments.
    """
    step = one_token_pass(model) or recorded_pass(model)
    fits = (
        batch == 1
        and step is not None
        and set(options) <= {"stopping_criteria", "logits_processor"}
        and _only_samples(_with_defaults(config, model.generation_config))
        and not model._forward_hooks
        and state.is_only_watcher(model)
    )
    return _Loop(step, state, streamer) if fits else None


def _only_samples(config: GenerationConfig) -> bool:
    return (
        config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and config.num_return_sequences in (None, 1)
        and config.use_cache is not False
        and not config.return_dict_in_generate
        and not config.prefill_chunk_size
    )


def _with_defaults(config: GenerationConfig, defaults: GenerationConfig) -> GenerationConfig:
    """What a config leaves open is taken from the model's own, as generate() does it."""
    merged = copy.deepcopy(defaults)
    merged.update(**{name: value for name, value in config.to_dict().items() if value is not None})
    return merged


class FiniteLogits(LogitsProcessor):
    """Refuses scores whose largest is not finite: no token can be chosen from them. For transformers' own loop."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool(scores.amax(dim=-1).isfinite().all()):
            raise PartInferError(NOT_FINITE)
        return scores


class _Loop:
    """Called by generate() with what it has prepared; returns the sequence, int64 [1, T + new].

    generate() gives the prompt to the streamer but passes no streamer to a `custom_generate`, so it has to be known
    here.
    """

    def __init__(self, step: OneTokenPass | RecordedPass, state: RequestState, streamer: BaseStreamer | None) -> None:
        self.step, self.state, self.streamer = step, state, streamer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs,
    ) -> torch.Tensor:
        cache, length = inputs["past_key_values"], input_ids.shape[1]
        ids = input_ids.new_empty(1, generation_config.max_length)
        ids[:, :length] = input_ids
        ended = _Ended(stopping_criteria)
        new = input_ids[:, cache.get_seq_length() :]
        logits, needed = _model_logits(model, new, cache), _needed(generation_config, logits_processor)
        try:
            while True:
                scores = logits_processor(ids[:, :length], logits[:, -1].float())
                token, value = _drawn(scores) if generation_config.do_sample else _largest(scores)
                if not math.isfinite(value):
                    raise PartInferError(NOT_FINITE)
                ids[:, length] = token
                length += 1
                done = ended(ids[:, :length], token)
                if self.streamer is not None:
                    self.streamer.put(ids[0, length - 1 : length].cpu())
                if done:
                    break
                logits = self._next_logits(model, ids[:, length - 1 : length], cache, needed)
        finally:
            self.step.finish()
        if self.streamer is not None:
            self.streamer.end()
        return ids[:, :length]

    def _next_logits(
        self, model: PreTrainedModel, token: torch.Tensor, cache: GrowingCache, needed: Needed
    ) -> torch.Tensor:
        if not self.step.ready(cache):
            return _model_logits(model, token, cache)
        self.state.begin_pass(1, 1, cache.layers[0].length, None)
        return self.step.logits(token, cache, needed)


def _needed(config: GenerationConfig, processors: LogitsProcessorList) -> Needed:
    """Which logits a token is chosen from: the largest, the k largest, those with most of the mass, or all of them."""
    if not config.do_sample:
        return Needed(largest=1) if not processors else SOFTMAX
    temperature = math.prod(p.temperature for p in processors if isinstance(p, TemperatureLogitsWarper))
    others = (p for p in processors if not isinstance(p, TemperatureLogitsWarper))
    first = next(others, None)  # any but these two may move logits past each other
    if isinstance(first, TopKLogitsWarper):
        return Needed(largest=first.top_k)
    if isinstance(first, TopPLogitsWarper):
        return Needed(tolerance=NUCLEUS_TOLERANCE, temperature=temperature)
    return Needed(temperature=temperature)


def _model_logits(model: PreTrainedModel, ids: torch.Tensor, cache: GrowingCache) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


def _largest(scores: torch.Tensor) -> tuple[int, float]:
    """The token with the largest score of [1, V], and the score; NaN counts as the largest."""
    if not scores.is_cpu:
        value, token = scores[0].max(dim=0)
        value, token = torch.stack([value.double(), token.double()]).tolist()  # the device is waited for once
        return int(token), value
    values = scores[0].numpy()  # finds the largest of 50,000 in 4 µs (PyTorch: 43)
    token = int(values.argmax())
    return token, float(values[token])


def _drawn(scores: torch.Tensor) -> tuple[int, float]:
    """A token by the probabilities of its scores [1, V], and its score."""
    try:
        token = int(torch.multinomial(torch.softmax(scores, dim=-1), 1))
        return token, float(scores[0, token])
    except RuntimeError:  # probabilities that are not finite
        raise PartInferError(NOT_FINITE) from None


class _Ended:
    """Stopping criteria. The two that almost every call has are checked without tensors (3 µs instead of 55)."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        ends = [c.eos_token_id.tolist() for c in criteria if type(c) is EosTokenCriteria]
        self.limit = min(limits, default=math.inf)
        self.ends = {token for group in ends for token in group}
        self.others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]

    def __call__(self, sequence: torch.Tensor, token: int) -> bool:
        others = [bool(criterion(sequence, None).all()) for criterion in self.others]
        return sequence.shape[1] >= self.limit or token in self.ends or any(others)
