"""How concentrated activations are, and how far rankings agree."""

from __future__ import annotations

import torch

from transformers_patches.config import neuron_count
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.neuron_file import NeuronFile


def concentration_curves(file: NeuronFile) -> torch.Tensor:
    """Share of the activation mass (the sum of mean |h| over the neurons) that the best k neurons hold.

    Returns float64 [layers, N]; entry k - 1 of a row is for the best k neurons by the file's ranking. Raises
    PartInferError if the file has no statistics.
    """
    if "mean_abs" not in file.statistics:
        raise PartInferError(f"{file.source} has no statistics, so its concentration is unknown: profile to get them")
    mass = file.statistics["mean_abs"].double().gather(1, file.ranking.long())
    total = mass.sum(1, keepdim=True)
    return mass.cumsum(1) / torch.where(total > 0, total, 1.0)


def concentration(file: NeuronFile, fractions: tuple[float, ...]) -> torch.Tensor:
    """Share of the activation mass in the given fractions of best neurons: float64 [layers, len(fractions)]."""
    curves = concentration_curves(file)
    counts = [neuron_count(fraction, file.intermediate_size) for fraction in fractions]
    return curves[:, [count - 1 for count in counts]]


def overlap(first: NeuronFile, second: NeuronFile, fraction: float) -> torch.Tensor:
    """Share of the best neurons of one ranking that are also among the best of the other: float64 [layers].

    fraction: how much of N counts as best. Raises PartInferError if the files differ in shape.
    """
    if first.ranking.shape != second.ranking.shape:
        shapes = (f"{file.source} ({file.num_layers} layers of {file.intermediate_size})" for file in (first, second))
        raise PartInferError(f"{' and '.join(shapes)} do not rank the same neurons: compare files of one model")
    first.check_ffns()
    count = neuron_count(fraction, first.intermediate_size)
    best = [
        torch.zeros(file.ranking.shape).scatter_(1, file.ranking[:, :count].long(), 1.0) for file in (first, second)
    ]
    return (best[0] * best[1]).sum(1).double() / count


def chance_overlap(intermediate_size: int, fraction: float) -> float:
    """The expected overlap of two random rankings."""
    return neuron_count(fraction, intermediate_size) / intermediate_size


def overlap_matrix(files: list[NeuronFile], fraction: float) -> torch.Tensor:
    """Overlap of every pair of files: float64 [files, files, layers], symmetric, 1 on the diagonal."""
    matrix = torch.ones(len(files), len(files), files[0].num_layers, dtype=torch.float64)
    for row in range(len(files)):
        for column in range(row):
            matrix[row, column] = matrix[column, row] = overlap(files[row], files[column], fraction)
    return matrix
