"""One batch through the model: a greedy continuation, then one pass that counts the activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from profiler.experts import expert_layers, expert_shape, experts_of, observing
from profiler.statistics import ActivationStatistics
from transformers_patches.families import family_of


class Collector:
    """Adds the activations of batches of token sequences to ActivationStatistics.

    The continuation is generated first. Prompt and continuation then go through the model in one pass, padded on the
    right, with hooks on the down projections. So every token is counted exactly once, including the last generated one.
    A token only attends to earlier ones, so neither padding nor the other sequences of a batch change anything.

    max_new_tokens: how many tokens to generate per sequence, up to and including the first end token; 0: prompts only
    """

    def __init__(self, model: PreTrainedModel, statistics: ActivationStatistics, max_new_tokens: int) -> None:
        self.model, self.statistics, self.max_new_tokens = model.eval(), statistics, max_new_tokens
        self._family = family_of(model.config)
        self._counted: torch.Tensor | None = None
        self._linears = [watched_linears(model, layer) for layer in range(statistics.num_layers)]
        self._mixtures = expert_layers(model)

    @classmethod
    def of(cls, model: PreTrainedModel, max_new_tokens: int) -> Collector:
        """A collector with statistics for every activation and input of the model that can be observed."""
        config, family = model.config, family_of(model.config)
        widths = {name: linear.in_features for name, linear in watched_linears(model, 0).items()}
        widths["head"] = model.get_output_embeddings().in_features
        experts = expert_shape(family)
        size = family.ffn_neurons(config) if experts else family.intermediate_size(config)
        statistics = ActivationStatistics(config.num_hidden_layers, size, widths, experts)
        return cls(model, statistics, max_new_tokens)

    @torch.no_grad()
    def observe(self, batch: list[list[int]]) -> int:
        """Add a batch to the pending statistics. Returns the number of tokens counted."""
        if self.max_new_tokens:
            batch = with_continuations(self.model, batch, self.max_new_tokens)
        inputs, mask = pad(batch, self.model.device, left=False)
        self._counted = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
        with self._watched():
            # The decoder only: logits are not needed. No mask: padding is on the right and attention is causal.
            output = self.model.base_model(input_ids=inputs, use_cache=False)
        if "head" in self.statistics.inputs:
            self.statistics.observe_input("head", 0, self._counted_rows(output.last_hidden_state))
        return int(mask.sum())

    @contextmanager
    def _watched(self) -> Iterator[None]:
        handles = []
        for layer, linears in enumerate(self._linears):
            if self._family.has_neurons(layer):
                down = self._family.down_projection(self.model, layer)
                handles.append(down.register_forward_pre_hook(self._hook(layer)))
            if layer in self._mixtures:
                observe = observing(self._family.experts, layer, self.statistics, self._counted_rows)
                handles.append(experts_of(self.model, layer).register_forward_pre_hook(observe))
            for name, linear in linears.items():
                if name in self.statistics.inputs:
                    handles.append(linear.register_forward_pre_hook(self._input_hook(name, layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int):
        def count(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            self.statistics.observe(layer, self._counted_rows(args[0]))

        return count

    def _input_hook(self, name: str, layer: int):
        def count(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            self.statistics.observe_input(name, layer, self._counted_rows(args[0]))

        return count

    def _counted_rows(self, values: torch.Tensor) -> torch.Tensor:
        """[T, width]: the rows of real tokens."""
        values = values.reshape(-1, values.shape[-1])  # OPT's have this shape already
        return values if self._counted is None else values.index_select(0, self._counted.to(values.device))


def watched_linears(model: PreTrainedModel, layer: int) -> dict[str, torch.nn.Linear]:
    """For each name of INPUT_SQUARES that the layer has, one linear layer that takes this input."""
    family = family_of(model.config)
    children = dict(family.decoder_layers(model)[layer].named_modules())
    there = {name: [place for place in places if place in children] for name, places in family.inputs().items()}
    return {name: children[places[0]] for name, places in there.items() if places}


def with_continuations(model: PreTrainedModel, batch: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Each sequence followed by its greedy continuation, up to and including the first end token."""
    inputs, mask = pad(batch, model.device, left=True)
    output = generate(model, inputs, mask, max_new_tokens, do_sample=False)
    ends = end_token_ids(model)
    return [ids + until_end(new, ends) for ids, new in zip(batch, output, strict=True)]


def generate(
    model: PreTrainedModel, inputs: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, *, do_sample: bool
) -> list[list[int]]:
    """Continue a left-padded batch. Returns the new ids of each sequence, padded after the end token.

    Sampling is plain, at temperature 1. Of the model's own generation settings only the end tokens are used.
    """
    ends = end_token_ids(model)
    model.generation_config = GenerationConfig(
        do_sample=do_sample,
        top_k=0 if do_sample else None,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    output = model.generate(inputs, attention_mask=mask)
    return output[:, inputs.shape[1] :].tolist()


def end_token_ids(model: PreTrainedModel) -> set[int]:
    """The ids that end a text: from the generation settings, or else from the model's config."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to and including the first end token."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


def pad(batch: list[list[int]], device: torch.device, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T], padded with 0 on one side, and the int64 mask [B, T], 1 for real tokens."""
    width = max(len(ids) for ids in batch)
    rows, masks = [], []
    for ids in batch:
        filler = [0] * (width - len(ids))
        real = [1] * len(ids)
        rows.append(filler + ids if left else ids + filler)
        masks.append(filler + real if left else real + filler)
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)
