"""From statistics to scores, and from scores to a ranking."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device
from torch import nn

from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.neurons.expert_neurons import ExpertNeurons
from transformers_patches.neurons.neuron_file import NeuronFile, ranking_from_scores

WEIGHTED = "_down"  # suffix of scores that are multiplied by the norm of the neuron's down column
SCORES = ("mean_abs", "rms", "griffin", "mean_abs_down", "rms_down", "griffin_down", "std_down")


def score_neurons(statistics: dict[str, torch.Tensor], score: str, source: str = "the statistics") -> torch.Tensor:
    """The score of every neuron: float32 [layers, N].

    mean_abs: mean |h|, as the original PartInfer ranks
    rms: root of mean h^2
    griffin: root of mean (h / ||h||_2)^2, the statistic of GRIFFIN (arXiv 2404.01365)
    std: standard deviation of h
    …_down: the same times ||W_down[:, i]||_2, so the size of what the neuron writes

    Raises PartInferError for an unknown score, and if a statistic is missing.
    """
    if score not in SCORES:
        raise PartInferError(f"unknown score {score!r}: expected one of {', '.join(SCORES)}")

    def get(name: str) -> torch.Tensor:
        if name not in statistics:
            raise PartInferError(
                f"{source} has no statistic {name!r}, which score {score} needs: profile again with python -m profiler run"
            )
        return statistics[name].double()

    plain = score.removesuffix(WEIGHTED)
    if plain == "mean_abs":
        values = get("mean_abs")
    elif plain == "rms":
        values = get("mean_sq").sqrt()
    elif plain == "griffin":
        values = get("normalized_mean_sq").sqrt()
    else:
        values = (get("mean_sq") - get("mean").square()).clamp(min=0).sqrt()
    if score.endswith(WEIGHTED):
        values = values * get("down_norm")
    return values.float()


def rank(
    statistics: dict[str, torch.Tensor],
    score: str,
    metadata: dict[str, str],
    source: str = "the statistics",
    input_squares: dict[str, torch.Tensor] | None = None,
    experts: ExpertNeurons | None = None,
) -> NeuronFile:
    """A neuron file ranked by a score. It keeps all statistics, so that it can be ranked again by another.

    input_squares, experts: statistics of linear layers' inputs, and of experts, that the file should hold as well
    """
    scores, metadata = score_neurons(statistics, score, source), {**metadata, "score": score}
    ranking = ranking_from_scores(scores)
    squares = dict(input_squares or {})
    return NeuronFile(ranking, scores, dict(statistics), metadata, input_squares=squares, experts=experts)


def down_norms(model: nn.Module) -> torch.Tensor:
    """||W_down[:, i]||_2 of every neuron: float32 [layers, N] on the CPU. Offloaded weights are fetched.

    0 in layers that can't be computed by neurons.
    """
    family = family_of(model.config)
    norms = []
    for layer in range(model.config.num_hidden_layers):
        if not family.has_neurons(layer):
            norms.append(torch.zeros(family.ffn_neurons(model.config)))
            continue
        down = family.down_projection(model, layer)
        with align_module_device(down):
            weight = down.weight.detach()  # [H, N]
            norms.append(torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).cpu())
    return torch.stack(norms)
