"""Answering: from a request to tokens, in the engine's thread."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from server.errors import ApiError
from server.jobs import Done, Job, Piece, Started
from server.metrics import Metrics
from server.reading import Reading, summary
from server.schema import Sampling
from transformers_patches.errors import PartInferError
from transformers_patches.generation.generate import GenerationOptions, GenerationResult, generate
from transformers_patches.generation.prefixes import Prefixes
from transformers_patches.generation.prompts import chat_ids, uses_chat_template
from transformers_patches.generation.token_logprobs import TokenLogprobs
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.other_settings import OtherSettings

COLDEST = 1e-4  # temperatures below it are greedy


class Answering:
    """One model, its tokenizer, and what requests leave open. Used by one thread at a time."""

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: OtherSettings,
        defaults: GenerationOptions,
        *,
        system_prompt: str | None = None,
        chats: bool = True,
    ) -> None:
        """defaults: of what a request does not say.
        chats: False to have no chat, as --no_chat_template says.
        """
        self.loaded, self.tokenizer, self.settings, self.defaults = loaded, tokenizer, settings, defaults
        self.system_prompt = system_prompt
        self.chats = uses_chat_template(tokenizer, not chats)
        self.prefixes = Prefixes(loaded)
        self.metrics: Metrics | None = None

    @property
    def context(self) -> int | None:
        """How many tokens a prompt and its answer may have together; None if the model does not say."""
        return getattr(self.loaded.model.config, "max_position_embeddings", None) or None

    def answer(self, job: Job) -> GenerationResult | None:
        """Answer a job; None if it was cancelled before. Raises ApiError for prompts and settings that can't be."""
        if job.cancelled:
            return None
        request = job.request
        options, ids = self.options(request), self.prompt_ids(request.prompt_input)
        self._check(ids)
        try:
            self.prefixes.setting = self.settings.use(request.setting)
        except PartInferError as error:
            raise ApiError(str(error), param="partinfer", code="needs_reload") from None
        job.put(Started(len(ids)))
        self.loaded.reset_counters()
        torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
        passing, self.prefixes.between = _Passing(job, self.loaded), lambda: _check_wanted(job)
        result = generate(
            self.loaded,
            self.tokenizer,
            ids,
            options,
            passing.text.append,
            self.prefixes,
            passing.token,
            passing.logprobs,
        )
        passing.rest()
        job.put(Done(result, self.prefixes.reused, summary(self.loaded, result)))
        if self.metrics is not None:
            self.metrics.answered(result, self.prefixes.reused)
        return result

    def options(self, request: Sampling) -> GenerationOptions:
        """What the request says, over the defaults. A temperature of 0 is greedy; top_p and top_k alone sample, too."""
        given = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k")}
        chosen = {name: value for name, value in given.items() if value is not None}
        if chosen:
            greedy = chosen.get("temperature", 1.0) < COLDEST
            chosen["sampling"] = "greedy" if greedy else "top-p"
            if greedy:
                del chosen["temperature"]
        stop = self.defaults.stop if request.stop is None else tuple(request.stop)
        return replace(
            self.defaults, **chosen, stop=stop, max_new_tokens=request.most_tokens or self.defaults.max_new_tokens
        )

    def prompt_ids(self, given: str | list[int] | list[dict[str, str]]) -> list[int]:
        """Token ids of a text, of token ids, or of messages."""
        if isinstance(given, str):
            return self.tokenizer(given)["input_ids"]
        if not given or isinstance(given[0], int):
            return given
        if not self.chats:
            raise ApiError("this model has no chat template: use /v1/completions", param="messages", code="no_chat")
        if self.system_prompt and given[0]["role"] != "system":
            given = [{"role": "system", "content": self.system_prompt}, *given]
        try:
            return chat_ids(self.tokenizer, given)
        except PartInferError as error:
            raise ApiError(str(error).partition("; --no_chat_template")[0], param="messages") from None

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise ApiError("the prompt has no tokens", code="empty_prompt")
        known, limit = self.loaded.model.config.vocab_size, self.context
        if max(ids) >= known:
            raise ApiError(
                f"the prompt has token {max(ids)}, but the model knows tokens 0 to {known - 1}", param="prompt"
            )
        if limit is not None and len(ids) >= limit:
            raise ApiError(
                f"the prompt has {len(ids)} tokens, the model's context is {limit}: shorten it",
                code="context_length_exceeded",
            )


def _check_wanted(job: Job) -> None:
    """Called while a long prompt is prefilled."""
    if job.cancelled:
        raise ApiError("cancelled", 499, code="cancelled")


class _Passing:
    """Passes on what each token makes certain."""

    def __init__(self, job: Job, loaded: LoadedModel) -> None:
        self.job, self.text = job, []
        count = job.request.logprob_count
        self.logprobs = None if count is None else TokenLogprobs(count)
        self._passed = 0  # log-probabilities
        self._reading = Reading(loaded) if job.wants_reading else None

    def token(self) -> bool:
        """Called after each token. Returns whether nobody wants more."""
        reading = None if self._reading is None else self._reading.token()
        if self.text or reading is not None:
            self._pass_on(reading)
        return self.job.cancelled

    def rest(self) -> None:
        """Pass on what the end has made certain."""
        if self.text or (self.logprobs is not None and self._passed < len(self.logprobs.tokens)):
            self._pass_on(None)

    def _pass_on(self, reading: dict | None) -> None:
        text = "".join(self.text)
        self.text.clear()
        logprobs = ()
        if self.logprobs is not None:
            logprobs = tuple(self.logprobs.tokens[self._passed :])
            self._passed = len(self.logprobs.tokens)
        self.job.put(Piece(text, logprobs, reading))


def timed(answering: Answering, took) -> object:
    """`answering.answer`, which reports to `took` the seconds of each answer."""

    def answer(job: Job) -> None:
        started = time.perf_counter()
        answering.answer(job)
        took(time.perf_counter() - started)

    return answer
