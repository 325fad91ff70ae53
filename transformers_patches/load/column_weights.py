"""How much an error in each column of a quantised weight counts: the more, the larger the layer's inputs are there.

The idea is that of AWQ (arXiv 2306.00978) and of llama.cpp's importance matrix: what a layer computes suffers from the
error of a weight in proportion to the input that the weight is multiplied with. docs/quantization.md has the formula.
"""

from __future__ import annotations

import torch

from transformers_patches.families import Family
from transformers_patches.neurons.neuron_file import NeuronFile

LEAST = 0.001  # the least that a column counts, relative to the average one


def column_weights(family: Family, neurons: NeuronFile | None, head: str) -> dict[str, torch.Tensor]:
    """How much each column counts, float32 [columns], by the names of the weights whose inputs the neuron file knows.

    head: name of the output projection's weight. Down projections are those of layers that stay whole.
    """
    weights: dict[str, torch.Tensor] = {}
    if neurons is None or not neurons.input_squares:
        return weights
    squares = neurons.input_squares
    for layer in range(neurons.num_layers):
        prefix = f"{family.layers}.{layer}"
        for name, places in family.inputs().items():
            if name in squares:
                values = relative(squares[name][layer])
                weights.update({f"{prefix}.{place}.weight": values for place in places})
        if "mean_sq" in neurons.statistics:
            down = f"{family.projection(layer, family.down)}.weight"
            weights[down] = relative(neurons.statistics["mean_sq"][layer])
    if "head" in squares:
        weights[head] = relative(squares["head"][0])
    return weights


def relative(squares: torch.Tensor) -> torch.Tensor:
    """Relative to their mean, and at least LEAST: other texts may use columns that the profiled ones did not."""
    mean = squares.float().mean()
    return (squares.float() / mean).clamp(min=LEAST) if mean > 0 else torch.ones_like(squares, dtype=torch.float32)
