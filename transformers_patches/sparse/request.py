"""Whether a forward pass is prefill or decode, and which of its tokens count: the state of the running request.

The phase follows the cache, not the number of tokens: one-token prompts are prompts, and several tokens scored
over a filled cache are decoding. A prompt that is prefilled in several passes (a chat's later turn, chunks) says its
length first, with `expect_prompt`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from transformers_patches.sparse.neuron_rows import NeuronRows

PREFILL, DECODE = "prefill", "decode"


@dataclass(slots=True)
class Counters:
    """What decoding has done since the last reset.

    An object of its own, because setting a number on a module takes microseconds.
    """

    tokens: int = 0  # tokens that were decoded
    neurons: int = 0  # neurons that were computed, summed over the tokens
    rows: int = 0  # rows of weights that were read

    def add(self, tokens: int, neurons: int, rows: int) -> None:
        self.tokens += tokens
        self.neurons += neurons
        self.rows += rows


class RequestLayer(Protocol):
    """What others know of a layer that works on the request (a SparseFFN)."""

    rows: NeuronRows  # the layer's loaded neurons
    counters: Counters  # what its decoding has done

    def reset(self) -> None:
        """Forget the request."""

    def reset_counters(self) -> None:
        """Count from 0 again."""

    @property
    def observes(self) -> bool:
        """Whether prompts decide what decoding computes."""

    def collected(self) -> dict[str, object]:
        """What the prompt has told so far."""

    def resume(self, collected: dict[str, object]) -> None:
        """Go on from what another prompt with the same first tokens had told."""


class RequestExperts(Protocol):
    """The same of a sparse mixture of experts."""

    counters: Counters
    neurons: int  # that a token computes if nothing is left out

    def collected(self) -> dict[object, object]:
        """What the prompt has told so far."""

    def resume(self, collected: dict[object, object]) -> None:
        """Go on from what another prompt with the same first tokens had told."""

    def reset(self) -> None:
        """Forget the request."""

    def reset_counters(self) -> None:
        """Count from 0 again."""


def _nothing_to_check() -> None:
    pass


class RequestState:
    """The request that a model is working on; every SparseFFN of the model refers to the same one.

    A pass over an empty cache begins a new request: what the layers know of the last one is dropped, however it ended.

    phase: PREFILL or DECODE, of the current pass.
    batch: sequences of the current pass.
    tokens: tokens of each sequence in the current pass.
    cached: tokens of each sequence in the cache before the current pass.
    token_mask: bool [batch, tokens], False where there is padding; None if there is none.
    layers: the layers that work on the request.
    experts: the same of sparse mixtures of experts.
    """

    def __init__(self) -> None:
        self.phase = PREFILL
        self.batch = self.tokens = self.cached = 0
        self.token_mask: torch.Tensor | None = None
        self.layers: list[RequestLayer] = []
        self.experts: list[RequestExperts] = []
        self.check_weights: Callable[[], None] = _nothing_to_check  # called before every pass over a prompt
        self._prompt_length: int | None = None
        self._watching: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Follow the passes of a transformers causal language model."""
        self._watching = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def is_only_watcher(self, model: nn.Module) -> bool:
        """Whether nobody else has hooked the model's passes, so that `begin_pass` may be called in their place."""
        return set(model._forward_pre_hooks) <= {self._watching.id} if self._watching else False

    def reset(self) -> None:
        """Forget the request: selections, evidence of the prompt, copies made for it."""
        self.phase, self.token_mask = PREFILL, None
        for layer in (*self.layers, *self.experts):
            layer.reset()

    @property
    def observes(self) -> bool:
        """Whether prompts decide what any layer computes in decoding."""
        return bool(self.experts) or any(layer.observes for layer in self.layers)

    def collected(self) -> list[dict[str, object]]:
        """What the prompt has told each layer so far, for `resume`."""
        return [layer.collected() for layer in (*self.layers, *self.experts)]

    def resume(self, collected: list[dict[str, object]] | None) -> None:
        """Go on, over a cache that holds the first tokens of a prompt, from what they told; None if they tell nothing."""
        self.reset()
        self.batch = 1
        for layer, parts in zip((*self.layers, *self.experts), collected or (), strict=collected is not None):
            layer.resume(parts)

    @contextmanager
    def expect_prompt(self, length: int) -> Iterator[None]:
        """Within this block, passes are prefill until the cache holds `length` tokens (padding included)."""
        self._prompt_length = length
        try:
            yield
        finally:
            self._prompt_length = None

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        # families order their parameters differently: positional arguments get their names first
        given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs if args else kwargs
        inputs, cache = given.get("input_ids"), given.get("past_key_values")
        if inputs is None:
            inputs = given["inputs_embeds"]
        cached = 0 if cache is None else int(cache.get_seq_length())
        self.begin_pass(inputs.shape[0], inputs.shape[1], cached, given.get("attention_mask"))

    def begin_pass(self, batch: int, tokens: int, cached: int, attention_mask: torch.Tensor | None) -> None:
        """Set the phase for a pass over [batch, tokens] ids with `cached` tokens before them.

        attention_mask: [batch, cached + tokens] or None. Raises ValueError for masks of another rank and for a
        batch that is not the one that was prefilled.
        """
        if cached == 0:
            self.reset()
        prompt_length = 1 if self._prompt_length is None else self._prompt_length
        self.phase = PREFILL if cached < prompt_length else DECODE
        if self.phase == PREFILL:
            self.check_weights()
        if cached and batch != self.batch:
            raise ValueError(f"the cache was prefilled for {self.batch} sequences, this pass has {batch}")
        self.batch, self.tokens, self.cached = batch, tokens, cached
        self.token_mask = None
        if attention_mask is not None and self.phase == PREFILL:
            if attention_mask.ndim != 2:
                raise ValueError(f"attention_mask must be [batch, tokens], got shape {list(attention_mask.shape)}")
            current = attention_mask[:, cached : cached + tokens].bool()
            self.token_mask = None if bool(current.all()) else current
