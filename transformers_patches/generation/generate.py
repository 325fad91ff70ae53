"""generate(): transformers' own generation, with text streamed as it comes, stop strings, timings and Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from transformers_patches.errors import PartInferError
from transformers_patches.fast_pass.kv_cache import GrowingLayer
from transformers_patches.fast_pass.one_token import new_cache
from transformers_patches.generation.blocks import prefill_blocks
from transformers_patches.generation.decoding_loop import FiniteLogits, one_sequence_loop
from transformers_patches.generation.options import GenerationOptions
from transformers_patches.generation.text import AnswerText, Sink
from transformers_patches.generation.token_logprobs import TokenLogprobs
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.token_ids import check_token_ids


@dataclass
class GenerationResult:
    """One answer."""

    text: str  # up to the first stop string
    token_ids: list[int]  # the generated tokens
    prompt_tokens: int  # tokens of the prompt
    prefilled_tokens: int  # tokens of the prompt that were not in the cache already
    time_to_first_token_s: float | None  # in seconds; None if no token was generated
    decode_tokens_per_second: float | None  # over the tokens after the first; None if there are none
    finish_reason: str  # stop (the model's end token or a stop string), length or interrupted

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids)


@dataclass
class Conversation:
    """The history of a chat on its key-value cache: what the next turn shares with it is not computed again."""

    cache: Cache | None = None  # None before the first turn
    token_ids: list[int] = field(default_factory=list)  # the tokens in the cache
    reused: int = 0  # tokens of the last prompt that were in the cache already

    def prepare(self, prompt: list[int], model: PreTrainedModel) -> Cache:
        """A cache that holds a true prefix of the prompt, at least one token less than it."""
        common = 0
        for ours, theirs in zip(self.token_ids, prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        if self.cache is not None and common and common < len(self.token_ids):
            if not all(_can_be_cut(layer) for layer in self.cache.layers):
                common = 0  # a sliding window or a state has forgotten what would be needed
            else:
                self.cache.crop(common - len(self.token_ids))
        if self.cache is None or not common:
            self.cache = new_cache(model)
        self.token_ids, self.reused = prompt[:common], common
        return self.cache

    def reached(self, length: int) -> None:
        """The cache holds the prompt's first `length` tokens."""

    def forget(self) -> None:
        self.cache, self.token_ids, self.reused = None, [], 0


def _can_be_cut(layer: CacheLayerMixin) -> bool:
    """Whether a layer of a cache still knows every token, so that the last ones can be taken away."""
    return type(layer) in (DynamicLayer, GrowingLayer)


def generate(
    loaded: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    options: GenerationOptions,
    sink: Sink | None = None,
    conversation: Conversation | None = None,
    stopped: Callable[[], bool] | None = None,
    logprobs: TokenLogprobs | None = None,
) -> GenerationResult:
    """Generate an answer to one prompt.

    prompt_ids: token ids of the whole prompt; in a conversation, of the whole history and the new turn.
    sink: called with each piece of text as soon as it is certain.
    stopped: called after each token; True ends the answer.
    logprobs: records the tokens' log-probabilities; a screened lm_head then computes more of its logits.

    Ctrl-C ends the generation and keeps the text; the next prompt starts from a clean state, as it does after an error.
    An answer ends (`length`) where the model's context does. Raises PartInferError for an empty prompt, for one that
    fills the model's context, for logits that are not finite, and if the file of the weights changed meanwhile.
    """
    _check_length(loaded, prompt_ids)
    check_token_ids(prompt_ids, loaded.model.config.vocab_size)
    started = time.perf_counter()
    conversation = conversation or Conversation()
    cache = conversation.prepare(prompt_ids, loaded.model)
    cached = conversation.reused
    config = options.generation_config(loaded.model.generation_config)
    limit = _context(loaded)
    if limit is not None:
        config.max_new_tokens = min(config.max_new_tokens, limit - len(prompt_ids))
    if config.pad_token_id is None:
        config.pad_token_id = _first_id(config.eos_token_id) or tokenizer.eos_token_id or 0
    recorder = _Recorder(AnswerText(tokenizer, options.stop + loaded.stop_strings, sink))
    ids = torch.tensor([prompt_ids], device=loaded.device)
    ending = _Stopped(stopped)
    interrupted, done = False, False
    try:
        watchers = _watchers(recorder, ending, logprobs)
        generate_ids(loaded, ids, config, None, cache, conversation.reached, **watchers)
        loaded.check_weights()
        done = True
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if not done:
            conversation.forget()  # the layers of the cache may hold different numbers of tokens
            loaded.state.reset()
    recorder.answer.finish()
    if done:
        conversation.token_ids = (prompt_ids + recorder.token_ids)[: int(cache.get_seq_length())]
    return GenerationResult(
        text=recorder.answer.text,
        token_ids=recorder.token_ids,
        prompt_tokens=len(prompt_ids),
        prefilled_tokens=len(prompt_ids) - cached,
        time_to_first_token_s=recorder.times[0] - started if recorder.times else None,
        decode_tokens_per_second=recorder.decode_speed(),
        finish_reason=_finish_reason(interrupted or ending.said, recorder, config),
    )


def _watchers(recorder: _Recorder, ending: _Stopped, logprobs: TokenLogprobs | None) -> dict:
    """Arguments of transformers' generate(): what is called at every token."""
    if logprobs is None:
        return {"stopping_criteria": StoppingCriteriaList([recorder, ending])}
    criteria = StoppingCriteriaList([recorder, logprobs, ending])
    return {"stopping_criteria": criteria, "logits_processor": LogitsProcessorList([logprobs.processor])}


def generate_ids(
    loaded: LoadedModel,
    ids: torch.Tensor,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    cache: Cache | None = None,
    reached: Callable[[int], None] | None = None,
    **options,
) -> torch.Tensor:
    """transformers' generation, as every answer runs it: from prompts [B, T] without padding to ids [B, T + new].

    cache: holds a prefix of the prompts.
    reached: called with the length of the cache after each block of the prompts; None: they are prefilled in one pass.
    options: further arguments of transformers' generate().
    """
    loop = one_sequence_loop(loaded.model, loaded.state, config, streamer, len(ids), options)
    if loop is None:
        options = {
            **options,
            "logits_processor": LogitsProcessorList([*options.get("logits_processor", ()), FiniteLogits()]),
        }
    cache = new_cache(loaded.model) if cache is None else cache
    with loaded.state.expect_prompt(ids.shape[1]), torch.inference_mode():
        if reached is not None:  # else in one pass, which is up to a quarter faster
            prefill_blocks(loaded.model, ids, cache, reached)
        return loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            generation_config=config,
            streamer=streamer,
            custom_generate=loop,
            **options,
        )


def _context(loaded: LoadedModel) -> int | None:
    """How many tokens a prompt and its answer may have together; None if the config does not say.

    A bound on memory was planned for --context tokens.
    """
    limit = getattr(loaded.model.config, "max_position_embeddings", None) or None
    planned = None if loaded.settings.memory is None else loaded.settings.context
    return min((most for most in (limit, planned) if most is not None), default=None)


def _check_length(loaded: LoadedModel, prompt_ids: list[int]) -> None:
    if not prompt_ids:
        raise PartInferError("the prompt has no tokens: give a text with --prompt")
    limit = _context(loaded)
    if limit is not None and len(prompt_ids) >= limit:
        whose = "the model's context is" if loaded.settings.memory is None else "--memory was planned with --context"
        raise PartInferError(f"the prompt has {len(prompt_ids)} tokens, {whose} {limit}: shorten it")


def _finish_reason(interrupted: bool, recorder: _Recorder, config: GenerationConfig) -> str:
    if interrupted:
        return "interrupted"
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ended = recorder.token_ids and recorder.token_ids[-1] in ends
    return "stop" if ended or recorder.answer.stopped else "length"


def _first_id(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


class _Stopped(StoppingCriteria):
    """Ends a generation when a function says so."""

    def __init__(self, stopped: Callable[[], bool] | None) -> None:
        self.stopped, self.said = stopped, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **_options) -> torch.Tensor:
        self.said = self.stopped is not None and self.stopped()
        return torch.full((len(input_ids),), self.said, device=input_ids.device)


class _Recorder(StoppingCriteria):
    """A stopping criterion that records the ids, their times, and the text up to a stop string."""

    def __init__(self, answer: AnswerText) -> None:
        self.answer = answer
        self.token_ids: list[int] = []
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_options) -> torch.Tensor:
        self.times.append(time.perf_counter())
        self.token_ids.append(int(input_ids[0, -1]))
        return input_ids.new_full((1,), self.answer.push(self.token_ids[-1]), dtype=torch.bool)

    def decode_speed(self) -> float | None:
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])
