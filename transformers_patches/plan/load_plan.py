"""LoadPlan: which neurons of which layer are read, in which order they are stored, and how many are computed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from transformers_patches.config import PartInferConfig, neuron_count
from transformers_patches.errors import PartInferError
from transformers_patches.families import Family, family_of
from transformers_patches.files import write_text_atomic
from transformers_patches.neurons.fit_file import FitFile
from transformers_patches.neurons.neuron_file import NeuronFile, ranking_from_scores

CANDIDATES = 1.75  # neurons that tokens choose among, times phi N; all loaded if those are fewer
FORMAT = "partinfer-load-plan"


@dataclass(frozen=True)
class LayerPlan:
    """The neurons of one sparse layer.

    neurons: int64 [L], the model's neuron indices in storage order, base neurons first.
    base_count: how many of them are always computed.
    computed_count: K, how many neurons a decode step computes in all.
    priority: int64 [L], the place of each stored neuron in the base ranking; lower is better.
    candidate_count: C, how many neurons a token chooses its K from; None if tokens don't choose.
    """

    neurons: torch.Tensor
    base_count: int
    computed_count: int
    priority: torch.Tensor
    candidate_count: int | None = None

    @property
    def loaded_count(self) -> int:
        return len(self.neurons)

    def in_order(self) -> LayerPlan:
        """The same neurons in the model's order, all candidates: what is stored by input has them as they are."""
        order = self.neurons.argsort()
        return replace(
            self,
            neurons=self.neurons[order],
            priority=self.priority[order],
            base_count=0,
            candidate_count=self.loaded_count,
        )


@dataclass(frozen=True)
class LoadPlan:
    """The sparse layers of a model; every other layer is loaded and computed whole.

    method: PartInferConfig's `method`.
    num_layers: layers of the model, sparse or not.
    intermediate_size: N, the FFN neurons of one layer; 0 if no layer can be computed by neurons.
    layers: the plans of the sparse layers, by layer number.
    experts: of sparse mixtures of experts, how many neurons of an expert a token computes, by layer number.
    expert_neurons: of mixtures that are loaded in part, which neurons of each expert are, rising, by layer number.
    expert_size: N of experts; 0 if none are loaded in part.
    """

    method: str
    num_layers: int
    intermediate_size: int
    layers: dict[int, LayerPlan]
    experts: dict[int, int] = field(default_factory=dict)
    expert_neurons: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    expert_size: int = 0

    def in_order(self) -> LoadPlan:
        """The same with every layer's neurons in the model's order."""
        return replace(self, layers={number: layer.in_order() for number, layer in self.layers.items()})

    @property
    def loaded_fraction(self) -> float:
        """Share of the sparse layers' neurons that is loaded (1 when there is no sparse layer)."""
        experts = [neurons for layer in self.expert_neurons.values() for neurons in layer]
        whole = len(self.layers) * self.intermediate_size + len(experts) * self.expert_size
        loaded = sum(p.loaded_count for p in self.layers.values()) + sum(map(len, experts))
        return loaded / whole if whole else 1.0

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: per sparse layer the loaded neurons, and how many of them are base neurons."""
        layers = {
            str(layer): {
                "base_count": plan.base_count,
                "computed_count": plan.computed_count,
                "candidate_count": plan.candidate_count,
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
            "experts": {str(layer): {"computed_count": kept} for layer, kept in self.experts.items()},
            "expert_neurons": {
                str(layer): [neurons.tolist() for neurons in experts] for layer, experts in self.expert_neurons.items()
            },
        }
        write_text_atomic(path, json.dumps(content))


def build_load_plan(
    settings: PartInferConfig,
    config: PretrainedConfig,
    dataset_neurons: NeuronFile | None = None,
    model_neurons: NeuronFile | None = None,
    fit: FitFile | None = None,
) -> LoadPlan:
    """The plan for a model: base neurons from the base ranking, then the best others of the other ranking.

    settings: no `auto` left (see resolve.py). One neuron file may be missing (the other one then ranks both), or both
    if nothing is loaded partially. With mean compensation, rankings go by spread instead. A fit file itself says which
    neurons are loaded. Raises PartInferError if partial loading is asked for without any neuron file, and for budgets
    that can't be met.
    """
    family = family_of(config)
    num_layers = config.num_hidden_layers
    if not (settings.use_partial_loading or settings.computes_sparsely):
        return LoadPlan(settings.method, num_layers, family.ffn_neurons(config), {})
    base, other = dataset_neurons or model_neurons, model_neurons or dataset_neurons
    if settings.base_neurons_type == "model":
        base, other = other, base
    sparse = _sparse_layers(settings, num_layers, fit)
    expert_neurons = _expert_neurons(settings, family, sparse, base)
    experts = _sparse_experts(settings, family, sparse, expert_neurons)
    some = bool(experts or expert_neurons)
    size = family.ffn_neurons(config) if some else family.intermediate_size(config)
    partly = settings.use_partial_loading and settings.loaded_neurons_percent < 1
    if partly and dataset_neurons is None and model_neurons is None:
        raise PartInferError(
            "partial loading needs a neuron file: give --dataset_neurons_filepath or --model_neurons_filepath, "
            "or make one with python -m profiler run"
        )
    rankings = [_ranking(settings, file) for file in (base, other)]
    matrices, layers = family.matrices, {}
    for layer in _with_neurons(sparse, family, some):
        base_ranking = torch.arange(size) if base is None else rankings[0][layer].long()
        other_ranking = base_ranking if other is None else rankings[1][layer].long()
        if fit is None:
            layers[layer] = _plan_layer(settings, size, matrices, base_ranking, other_ranking)
        else:
            layers[layer] = _plan_fitted_layer(settings, size, matrices, base_ranking, fit, layer)
    expert_size = family.experts.size if expert_neurons else 0
    return LoadPlan(settings.method, num_layers, size, layers, experts, expert_neurons, expert_size)


def _expert_neurons(
    settings: PartInferConfig, family: Family, layers: list[int], base: NeuronFile | None
) -> dict[int, list[torch.Tensor]]:
    """Which neurons of each expert are loaded, in the layers whose experts are loaded in part.

    They are where the neuron file knows them; else experts stay whole.
    """
    share = settings.loaded_neurons_percent
    known = None if base is None else base.experts
    if not settings.use_partial_loading or share == 1 or known is None:
        return {}
    if family.experts is not None and family.experts.interleaved:
        raise PartInferError(
            "experts whose columns of gate and up take turns can't be loaded in part: use --loaded_neurons_percent 1"
        )
    score = base.metadata.get("score", "")
    return {layer: known.loaded(layer, share, score) for layer in known.layers if layer in layers}


def _sparse_experts(
    settings: PartInferConfig, family: Family, layers: list[int], partly: dict[int, list[torch.Tensor]]
) -> dict[int, int]:
    """How many neurons of an expert a token computes in each of the layers that have experts.

    They are chosen for every token among those that are loaded, of experts that are whole only where everything is. partly:
    the layers whose experts are loaded in part. With other settings a token computes all that is loaded.
    """
    everything = not settings.use_partial_loading or settings.loaded_neurons_percent == 1
    chosen = family.expert_layers(1 + max(layers, default=-1))
    if not (chosen and settings.selection == "up" and settings.computes_sparsely):
        return {}
    size = family.experts.size
    able = [layer for layer in chosen if layer in layers and (everything or layer in partly)]
    if not able:
        return {}
    candidates = size if everything else neuron_count(settings.loaded_neurons_percent, size)
    return dict.fromkeys(able, kept_count(settings.sparsity, candidates, size, 3))


def _ranking(settings: PartInferConfig, neurons: NeuronFile | None) -> torch.Tensor | None:
    """int [layers, N]: the file's own, or by spread, where means are compensated."""
    if neurons is None or settings.compensation != "mean" or not neurons.has_spread:
        return None if neurons is None else neurons.ranking
    return ranking_from_scores(neurons.spread())


def _sparse_layers(settings: PartInferConfig, num_layers: int, fit: FitFile | None) -> list[int]:
    if settings.budget != "per_layer":
        return list(settings.resolve_layers(num_layers))
    if fit is None or not fit.layer_sparsity:
        raise PartInferError(
            "budget per_layer needs a fit file with a share for every layer: make one with "
            "python -m profiler fit --budget per_layer"
        )
    return sorted(fit.layers)


def _with_neurons(layers: list[int], family: Family, experts: bool) -> list[int]:
    """Those that can be computed by neurons; PartInferError if none of them can, and there are no experts to choose in."""
    able = [layer for layer in layers if family.has_neurons(layer)]
    if layers and not able and not experts:
        raise PartInferError(
            f"layers {layers[0]} to {layers[-1]} can't be computed by neurons: {family.whole_layers[layers[0]]}; choose "
            "others with --start_num and --end_num, or use --method dense"
        )
    return able


def _plan_layer(
    settings: PartInferConfig, size: int, matrices: int, base_ranking: torch.Tensor, other_ranking: torch.Tensor
) -> LayerPlan:
    base_count = neuron_count(settings.base_neurons_percent, size)
    if settings.use_partial_loading:
        loaded = neuron_count(settings.loaded_neurons_percent, size)
        neurons = _base_then_others(base_ranking, other_ranking, base_count, loaded)
    else:
        neurons = torch.arange(size)  # the checkpoint's own order reads fastest
    return _with_counts(settings, settings.sparsity, size, matrices, neurons, base_ranking, base_count)


def _plan_fitted_layer(
    settings: PartInferConfig, size: int, matrices: int, base_ranking: torch.Tensor, fit: FitFile, layer: int
) -> LayerPlan:
    """The fit's neurons in the fit's order, which is that of its weights."""
    fitted = fit.layers[layer]
    sparsity = fit.layer_sparsity.get(layer, settings.sparsity) if settings.budget == "per_layer" else settings.sparsity
    neurons = fitted.neurons.long()
    base_count = min(neuron_count(settings.base_neurons_percent, size), neuron_count(sparsity, size), len(neurons))
    return _with_counts(settings, sparsity, size, matrices, neurons, base_ranking, base_count)


def _with_counts(
    settings: PartInferConfig,
    sparsity: float,
    size: int,
    matrices: int,
    neurons: torch.Tensor,
    base_ranking: torch.Tensor,
    base_count: int,
) -> LayerPlan:
    place = torch.empty(size, dtype=torch.int64)
    place[base_ranking] = torch.arange(size)
    priority, loaded = place[neurons], len(neurons)
    if settings.method == "dense":
        return LayerPlan(neurons, loaded, loaded, priority)
    base_count = base_count if settings.method == "partinfer" else 0
    if not settings.selects_per_token:
        return LayerPlan(neurons, base_count, min(neuron_count(sparsity, size), loaded), priority)
    candidates = candidate_count(sparsity, loaded, size)
    kept = kept_count(sparsity, candidates, size, matrices)
    return LayerPlan(neurons, min(base_count, candidates), kept, priority, candidates)


def candidate_count(sparsity: float, loaded: int, intermediate_size: int) -> int:
    """How many of the loaded neurons a token chooses among: in proportion to sparsity, or all."""
    return min(neuron_count(min(1.0, CANDIDATES * sparsity), intermediate_size), loaded)


def kept_count(sparsity: float, candidates: int, intermediate_size: int, matrices: int) -> int:
    """How many of the candidates a token computes, so that decoding reads `sparsity` of the FFN's bytes.

    One of `matrices` (3 gated, 2 plain) equally large projections is read for the candidates, the others for the kept:
    candidates / matrices + kept (matrices - 1) / matrices = sparsity N. At most all candidates. Raises
    PartInferError if not even one can be kept.
    """
    kept = round((matrices * sparsity * intermediate_size - candidates) / (matrices - 1))
    if kept < 1:
        raise PartInferError(
            f"reading one projection of {candidates} candidates takes all of sparsity {sparsity:g}: "
            "give more --sparsity"
        )
    return min(kept, candidates)


def _base_then_others(base_ranking, other_ranking, base_count: int, loaded_count: int) -> torch.Tensor:
    """int64 [loaded_count]: the first base_count of one ranking, then the best others of the other ranking."""
    base = base_ranking[:base_count]
    is_base = torch.zeros(len(base_ranking), dtype=torch.bool)
    is_base[base] = True
    others = other_ranking[~is_base[other_ranking]]
    return torch.cat([base, others[: loaded_count - base_count]])
