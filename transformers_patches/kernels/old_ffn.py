"""The former entry points to `kernels.ffn`, until nothing calls them any more."""

from __future__ import annotations

from torch import Tensor

from transformers_patches.kernels.layer import ActiveNeurons, Projections
from transformers_patches.kernels.operations import ffn


def sparse_ffn(x, gate, up, down, prefix, index, activation, **biases) -> Tensor:
    projections = Projections.of([(gate, biases.get("bias_gate")), (up, biases.get("bias_up")), (down, None)])
    return ffn(x, ActiveNeurons(projections, activation, prefix, index))[0]


def sparse_ffn_plain(x, fc1, bias1, fc2, prefix, index, activation="relu") -> Tensor:
    projections = Projections.of([(fc1, bias1), (fc2, None)])
    return ffn(x, ActiveNeurons(projections, activation, prefix, index))[0]


def sparse_ffn_by_up(x, gate, up, down, *choice, activation="silu", **rest) -> tuple[Tensor, Tensor]:
    projections = Projections.of([(gate, None), (up, None), (down, None)])
    return ffn(x, ActiveNeurons(projections, activation, *choice, **rest))


def sparse_ffn_plain_by_size(x, fc1, bias1, fc2, *choice, activation="relu", **rest) -> tuple[Tensor, Tensor]:
    projections = Projections.of([(fc1, bias1), (fc2, None)])
    return ffn(x, ActiveNeurons(projections, activation, *choice, **rest))
