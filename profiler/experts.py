"""Activations inside of experts, of the tokens that a router sends to each, and the norms of their output columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from profiler.statistics import ActivationStatistics
from transformers_patches.families import Family, family_of
from transformers_patches.neurons.expert_neurons import LEAST_TOKENS, ExpertNeurons
from transformers_patches.structure.activations import clamped
from transformers_patches.structure.experts_layout import ExpertsLayout


def expert_layers(model: PreTrainedModel) -> list[int]:
    """Layers with experts whose layout is known."""
    return family_of(model.config).expert_layers(model.config.num_hidden_layers)


def expert_shape(family: Family) -> tuple[int, int] | None:
    """E and N of a model's experts; None if it has none that are known."""
    return None if family.experts is None else (family.experts.count, family.experts.size)


def experts_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module that holds a layer's experts."""
    family = family_of(model.config)
    return family.decoder_layers(model)[layer].get_submodule(family.found.experts)


def observing(
    layout: ExpertsLayout,
    layer: int,
    statistics: ActivationStatistics,
    counted: Callable[[torch.Tensor], torch.Tensor],
) -> Callable:
    """A forward pre-hook for a layer's experts, which adds their activations to the statistics.

    counted: the rows of real tokens, of values [T, …]. The activations are computed a second time for it.
    """

    def observe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, chosen = counted(args[0]), counted(args[1])
        with align_module_device(module):
            for expert in chosen.unique().tolist():
                tokens = (chosen == expert).any(dim=1)
                statistics.observe_expert(layer, expert, _activations(module, layout, expert, x[tokens]))

    return observe


def _activations(module: nn.Module, layout: ExpertsLayout, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What enters an expert's output projection, [n, N] for x [n, H]."""
    weights = getattr(module, layout.gate_up)[expert]
    if layout.interleaved:
        both = x @ weights + getattr(module, layout.gate_up_bias)[expert]
        gate, up = clamped(both[..., ::2], both[..., 1::2])
        return gate * up
    gate, up = nn.functional.linear(x, weights).chunk(2, dim=-1)
    return ACT2FN[layout.activation](gate) * up


def expert_neurons(model: PreTrainedModel, statistics: ActivationStatistics) -> ExpertNeurons | None:
    """What was observed in experts; None if there are none."""
    layers, layout = expert_layers(model), family_of(model.config).experts
    if not layers:
        return None
    tokens, means = statistics.expert_means(layers)
    norms = []
    for layer in layers:
        module = experts_of(model, layer)
        with align_module_device(module):
            down = getattr(module, layout.down).detach()  # [E, H, N], or [E, N, H]
            norms.append(torch.linalg.vector_norm(down, dim=2 if layout.interleaved else 1, dtype=torch.float32).cpu())
    values = {**means, "down_norm": torch.stack(norms)}
    return ExpertNeurons(tuple(layers), tokens, values).as_stored()


def few_tokens(experts: ExpertNeurons) -> str:
    """A line on the experts that a profile says too little about."""
    layers, count, _ = experts.shape
    return (
        f"{experts.unknown} of {layers * count} experts saw fewer than {LEAST_TOKENS} tokens: their neurons are ranked "
        "by their weights alone"
    )
