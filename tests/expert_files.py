"""Neuron files of mixtures, made up."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from transformers_patches.families import family_of
from transformers_patches.neurons.expert_neurons import ExpertNeurons
from transformers_patches.neurons.neuron_file import NeuronFile


def expert_neurons(layers: int, count: int, size: int, seed: int = 0) -> ExpertNeurons:
    """Random statistics; the router's use of experts differs a lot."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, count, size)
    tokens = (torch.rand(layers, count, generator=generator).square() * 1000 + 20).long()
    values = {name: torch.rand(shape, generator=generator) for name in ("mean_abs", "rms", "down_norm")}
    return ExpertNeurons(tuple(range(layers)), tokens, values).as_stored()


def expert_file(model: PreTrainedModel) -> NeuronFile:
    """For a model that has nothing but experts."""
    config, layout = model.config, family_of(model.config).experts
    experts = expert_neurons(config.num_hidden_layers, layout.count, layout.size)
    ranking = torch.zeros(config.num_hidden_layers, 0, dtype=torch.int32)
    return NeuronFile(ranking, metadata={"score": "mean_abs_down"}, experts=experts)
