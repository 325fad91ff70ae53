"""Recording: a model's step over one token, recorded once for a kind of choices and replayed for every token.

On a GPU a small model's step is hundreds of kernels that take microseconds each, and starting them takes the processor
longer than the GPU computes. A CUDA graph starts all of them at once. What it reads lies at fixed places in memory:
token, position, keys and values, and the sparse layers' choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from transformers_patches.fast_pass.kv_cache import GrowingLayer
from transformers_patches.kernels import ActiveNeurons
from transformers_patches.sparse.sparse_ffn import SparseFFN
from transformers_patches.sparse.static_choice import StaticChoice

Step = Callable[[], torch.Tensor]
WARM_UPS = 3  # runs before recording, in which kernels are compiled and libraries take their memory


class Recorder(Protocol):
    """Records a step: what it returns runs it again, over what is in memory then, and gives the step's result."""

    def __call__(self, step: Step) -> Step: ...


def cuda_graph(step: Step) -> Step:
    """A step as one CUDA graph. It must not wait for the device."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


class _StaticLayer(CacheLayerMixin):
    """Keys and values [1, heads, capacity, head size] of one layer; a pass over one token writes at a position."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.position, self.is_initialized = keys, values, position, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the memory is there."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write one token's [1, heads, 1, head size]; returns everything, of which the mask hides the rest."""
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[-2], 0

    def get_seq_length(self) -> int:
        """Not known on the processor. Models that ask although they are given positions don't use the answer."""
        return 0

    def get_max_length(self) -> int:
        return self.keys.shape[-2]


class Recording:
    """One token through a model, for choices of one kind and for up to `capacity` tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[SparseFFN],
        actives: Sequence[ActiveNeurons],
        like: Sequence[GrowingLayer],
        capacity: int,
    ) -> None:
        """layers, actives: the model's sparse FFNs and what they compute. like: a cache's layers, for their shapes."""
        self.model, self.layers, self.capacity = model, layers, capacity
        device = like[0].keys.device
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(capacity, device=device)
        self.choices = [StaticChoice(active, device) for active in actives]
        self.stores = [
            _StaticLayer(*(_room(part, capacity) for part in (layer.keys, layer.values)), self.position)
            for layer in like
        ]
        self.replay: Step | None = None

    def record(self, recorder: Recorder, token: torch.Tensor, position: int) -> None:
        """Record the step. What it writes meanwhile, at `position`, is written again by the first replay."""
        self._set(token, position)
        with torch.cuda.device(token.device) if token.is_cuda else nullcontext():  # streams are the current GPU's
            self.replay = recorder(self._step)
        self.take_counts()

    def run(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """The logits [1, 1, V] after a token, ids [1, 1]; its keys and values are written. Overwritten by the next."""
        self._set(token, position)
        return self.replay()

    def take_counts(self) -> list[int]:
        """Neurons that each layer has computed since this was last called. Waits for the device."""
        counts = [choice.computed for choice in self.choices]
        computed = torch.cat(counts).tolist() if counts else []
        for count in counts:
            count.zero_()
        return computed

    def _set(self, token: torch.Tensor, position: int) -> None:
        self.ids.copy_(token)
        self.position.fill_(position)

    def _step(self) -> torch.Tensor:
        mask = (self.places <= self.position)[None, None, None]  # [1, 1, 1, capacity]
        for layer, choice in zip(self.layers, self.choices, strict=True):
            layer.static = choice
        try:
            return self.model.forward(
                input_ids=self.ids,
                position_ids=self.position[None],
                attention_mask=mask,
                past_key_values=Cache(layers=self.stores),
                use_cache=True,
                logits_to_keep=1,
            ).logits
        finally:
            for layer in self.layers:
                layer.static = None


def _room(like: torch.Tensor, capacity: int) -> torch.Tensor:
    """Zeros, not what memory happens to hold: hidden keys and values are multiplied by 0, and 0 times NaN is NaN."""
    return like.new_zeros(*like.shape[:2], capacity, like.shape[3])


def has_plain_attention(model: nn.Module) -> bool:
    """Whether every layer attends to all tokens: the mask of a recorded step knows no windows."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None
