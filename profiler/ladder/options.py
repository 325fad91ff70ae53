"""What can be left out of one layer, how many bytes that saves, and what it is predicted to cost.

An option changes the output of a group of linear layers by δ. Its cost is predicted as ½ mean (g·δ)² over tokens, g the
gradient of the loss at the output with labels drawn from the model: the second-order term of the loss with the Fisher
information for its Hessian (LeCun et al., Optimal Brain Damage, 1990). Nothing is multiplied by the weights for it, since
g·W d = (Wᵀ g)·d, and Wᵀ g is the same for all options.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from profiler.ladder.layer import FloatLayer, Tokens
from transformers_patches.neurons.byte_ladder import EVERYTHING

INPUT_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of the inputs of q, k, v, and of o
UP_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3)  # of the inputs of up
NEURON_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2)  # of the neurons: rows of gate
DOWN_SHARES = (1.0, 0.75, 0.55)  # of the rows of down of the chosen neurons
_SAMPLE = 2**16  # values from which a quantile is estimated


@dataclass(frozen=True)
class Option:
    """One way to read less of a group of a layer's weights. Shares are what the tokens had on average."""

    weights: float  # how many of the group's weights are read
    loss: float  # nats per token
    thresholds: dict[str, float]  # by names in THRESHOLDS, those of the group
    neurons: float = 1.0  # share that is chosen


def layer_options(layer: FloatLayer) -> list[list[Option]]:
    """The options of q, k and v; of o; and of the FFN. The first of each reads everything."""
    return [
        input_options("attention", layer.attention, layer.norm["attention"], layer.weights["attention"]),
        input_options(
            "attention_output",
            layer.attention_output,
            layer.norm["attention_output"],
            layer.weights["attention_output"],
        ),
        list(ffn_options(layer)),
    ]


def input_options(name: str, tokens: Tokens, norm: torch.Tensor, weights: int) -> list[Option]:
    """Read fewer inputs of linear layers that share them."""
    options = [Option(weights, 0.0, {name: EVERYTHING})]
    scores, changes = tokens.deviation.abs() * norm.float(), tokens.kept_out
    for share in INPUT_SHARES:
        threshold = threshold_for(scores, share)
        read = scores > threshold
        errors = torch.where(read, 0.0, changes).sum(1)
        options.append(Option(weights * _mean(read), _loss(errors), {name: threshold}))
    return options


def ffn_options(layer: FloatLayer) -> Iterator[Option]:
    """Read fewer inputs of up, rows of gate, and rows of down, each chosen with what those before it have left."""
    for share in UP_SHARES:
        yield from _with_inputs(layer, share)


def _with_inputs(layer: FloatLayer, share: float) -> Iterator[Option]:
    """The options with a share of the inputs of up."""
    tokens, mean = layer.ffn, layer.mean["ffn"].float()
    input_threshold, up, inputs_read = EVERYTHING, tokens.up, 1.0
    if share < 1:
        scores = (tokens.x - mean).abs() * layer.norm["ffn"].float()
        input_threshold = threshold_for(scores, share)
        read = scores > input_threshold
        up, inputs_read = F.linear(torch.where(read, tokens.x, mean), layer.up, layer.up_bias), _mean(read)
    whole = (tokens.pull * tokens.gate * tokens.up).sum(1)
    h = tokens.gate * up
    changes, sizes = tokens.pull * h, h.abs() * layer.down_norm
    scores = up.abs() * (layer.gate_size * layer.down_norm)
    for neurons in NEURON_SHARES:
        neuron_threshold = threshold_for(scores, neurons)
        chosen = scores > neuron_threshold
        of_chosen = torch.where(chosen, sizes, EVERYTHING) if neurons < 1 else sizes
        gate_read = _mean(chosen)
        for of_them in DOWN_SHARES:
            down_threshold = threshold_for(of_chosen, of_them * gate_read) if of_them < 1 else EVERYTHING
            kept = (of_chosen > down_threshold) if of_them < 1 else chosen
            read = layer.weights["matrix"] * (inputs_read + gate_read + _mean(kept))
            loss = 0.0 if min(share, neurons, of_them) == 1 else _loss(torch.where(kept, changes, 0.0).sum(1) - whole)
            thresholds = {"ffn": input_threshold, "neurons": neuron_threshold, "down": down_threshold}
            yield Option(read, loss, thresholds, gate_read)


def threshold_for(scores: torch.Tensor, share: float) -> float:
    """Above which a share of the scores lie; EVERYTHING for 1. Of many scores, a sample is asked."""
    if share >= 1:
        return EVERYTHING
    values = scores.flatten()
    if len(values) > _SAMPLE:
        generator = torch.Generator().manual_seed(0)
        values = values[torch.randint(len(values), (_SAMPLE,), generator=generator).to(values.device)]
    rank = len(values) - round(share * len(values))
    return float(values.kthvalue(max(1, rank)).values)


def _mean(mask: torch.Tensor) -> float:
    return int(mask.count_nonzero()) / mask.numel()


def _loss(errors: torch.Tensor) -> float:
    """Nats per token. errors: [T], g·δ."""
    return float(errors.square().mean()) / 2
