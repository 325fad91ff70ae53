"""Rankings for groups of tasks or for a whole model: the mean of several data sets' per-token means."""

from __future__ import annotations

import torch

from profiler.ranking import rank
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.expert_neurons import ExpertNeurons, merged
from transformers_patches.neurons.neuron_file import STATISTICS, NeuronFile


def merge(files: list[NeuronFile], score: str, task_type: str) -> NeuronFile:
    """Merge neuron files of one model. Every data set has the same weight, however many tokens it has.

    A file that was itself merged counts once for each of its data sets. Input statistics that some file lacks are left
    out. Raises PartInferError for files without statistics, and for files of different models.
    """
    first = files[0]
    for file in files:
        _check(file, first)
    weights = torch.tensor([int(file.metadata.get("datasets", 1)) for file in files], dtype=torch.float64)

    def mean(parts: list[torch.Tensor]) -> torch.Tensor:
        values = torch.stack([part.double() for part in parts])  # [files, layers, N]
        return torch.einsum("f,fln->ln", weights / weights.sum(), values).float()

    statistics = {name: mean([file.statistics[name] for file in files]) for name in STATISTICS}
    inputs = [name for name in first.input_squares if all(name in file.input_squares for file in files)]
    squares = {name: mean([file.input_squares[name] for file in files]) for name in inputs}
    shared = {k: v for k, v in first.metadata.items() if k in ("model_name", "model_type", "fingerprint")}
    metadata = {
        **shared,
        "task_type": task_type,
        "dataset": " + ".join(file.metadata.get("dataset", file.source) for file in files),
        "datasets": str(int(weights.sum())),
        "tokens": str(sum(file.tokens for file in files)),
        "texts": str(sum(int(file.metadata.get("texts", 0)) for file in files)),
    }
    return rank(statistics, score, metadata, input_squares=squares, experts=_experts(files, weights))


def _experts(files: list[NeuronFile], weights: torch.Tensor) -> ExpertNeurons | None:
    """Those of all files; None where not all of them have some."""
    parts = [file.experts for file in files]
    if any(part is None for part in parts):
        return None
    return merged(parts, weights.tolist(), [file.tokens for file in files], files[-1].source)


def _check(file: NeuronFile, first: NeuronFile) -> None:
    missing = [name for name in STATISTICS if name not in file.statistics]
    if missing:
        raise PartInferError(
            f"{file.source} has no statistics ({', '.join(missing)}): only files made by python -m profiler run or merge "
            "can be merged"
        )
    ours, theirs = ((f.ranking.shape, f.metadata.get("fingerprint")) for f in (first, file))
    if ours != theirs:
        raise PartInferError(
            f"{file.source} was made from {file.metadata.get('model_name', 'another model')}, "
            f"{first.source} from {first.metadata.get('model_name', 'another model')}: merge files of one model"
        )
