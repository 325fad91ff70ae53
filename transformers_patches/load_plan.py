"""LoadPlan: which neurons of which layer are read, in which order they are stored, and how many are computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from transformers_patches.config import PartInferConfig, neuron_count
from transformers_patches.errors import PartInferError
from transformers_patches.families import ffn_spec
from transformers_patches.files import write_text_atomic
from transformers_patches.neuron_file import NeuronFile

FORMAT = "partinfer-load-plan"


@dataclass(frozen=True)
class LayerPlan:
    """The neurons of one sparse layer.

    neurons: int64 [L], the model's neuron indices in storage order, base neurons first; base_count: how many of
    them are computed always; computed_count: K, how many a decode step computes in all; priority: int64 [L], place
    of each stored neuron in the base ranking, lower is better.
    """

    neurons: torch.Tensor
    base_count: int
    computed_count: int
    priority: torch.Tensor

    @property
    def loaded_count(self) -> int:
        return len(self.neurons)


@dataclass(frozen=True)
class LoadPlan:
    """The sparse layers of a model; every other layer is loaded and computed whole."""

    method: str
    num_layers: int
    intermediate_size: int
    layers: dict[int, LayerPlan]

    @property
    def loaded_fraction(self) -> float:
        """Share of the sparse layers' neurons that is loaded (1 when there is no sparse layer)."""
        if not self.layers:
            return 1.0
        return sum(p.loaded_count for p in self.layers.values()) / (len(self.layers) * self.intermediate_size)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: per sparse layer the loaded neurons, and how many of them are base neurons."""
        layers = {
            str(layer): {
                "base_count": plan.base_count,
                "computed_count": plan.computed_count,
                "neurons": plan.neurons.tolist(),
            }
            for layer, plan in self.layers.items()
        }
        content = {
            "format": FORMAT,
            "method": self.method,
            "num_layers": self.num_layers,
            "intermediate_size": self.intermediate_size,
            "layers": layers,
        }
        write_text_atomic(path, json.dumps(content))


def build_load_plan(
    settings: PartInferConfig,
    config: PretrainedConfig,
    dataset_neurons: NeuronFile | None = None,
    model_neurons: NeuronFile | None = None,
) -> LoadPlan:
    """The plan for a model: base neurons from the base ranking, then the best others of the other ranking.

    One neuron file may be missing (the other one then ranks both), or both if nothing is loaded partially. Raises
    PartInferError if partial loading is asked for without any neuron file.
    """
    size, num_layers = ffn_spec(config).intermediate_size(config), config.num_hidden_layers
    if not (settings.use_partial_loading or settings.computes_sparsely):
        return LoadPlan(settings.method, num_layers, size, {})
    if settings.use_partial_loading and dataset_neurons is None and model_neurons is None:
        raise PartInferError(
            "partial loading needs a neuron file: give --dataset_neurons_filepath or --model_neurons_filepath, "
            "or make one with python -m profiler run"
        )
    base, other = dataset_neurons or model_neurons, model_neurons or dataset_neurons
    if settings.base_neurons_type == "model":
        base, other = other, base
    layers = {}
    for layer in settings.resolve_layers(num_layers):
        base_ranking = torch.arange(size) if base is None else base.ranking[layer].long()
        other_ranking = base_ranking if other is None else other.ranking[layer].long()
        layers[layer] = _plan_layer(settings, size, base_ranking, other_ranking)
    return LoadPlan(settings.method, num_layers, size, layers)


def _plan_layer(settings: PartInferConfig, size: int, base_ranking, other_ranking) -> LayerPlan:
    place = torch.empty(size, dtype=torch.int64)
    place[base_ranking] = torch.arange(size)
    base_count = neuron_count(settings.base_neurons_percent, size)
    if settings.use_partial_loading:
        neurons = _base_then_others(
            base_ranking, other_ranking, base_count, neuron_count(settings.loaded_neurons_percent, size)
        )
    else:
        neurons = torch.arange(size)  # the checkpoint's own order reads fastest
    if settings.method == "dense":
        base_count = computed = len(neurons)
    else:
        base_count = base_count if settings.method == "partinfer" else 0
        computed = neuron_count(settings.sparsity, size)
    return LayerPlan(neurons, base_count, computed, place[neurons])


def _base_then_others(base_ranking, other_ranking, base_count: int, loaded_count: int) -> torch.Tensor:
    """int64 [loaded_count]: the first base_count of one ranking, then what the other ranking has best besides."""
    base = base_ranking[:base_count]
    is_base = torch.zeros(len(base_ranking), dtype=torch.bool)
    is_base[base] = True
    others = other_ranking[~is_base[other_ranking]]
    return torch.cat([base, others[: loaded_count - base_count]])
