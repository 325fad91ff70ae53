"""ByteLadder: settings that read fewer and fewer bytes of all decoder layers, as the profiler found and measured them.

A decoded token reads only some inputs of the linear layers (those that are far from their mean and weigh much), chooses
neurons by `up`, and leaves out the rows of `down` whose activation turned out small. docs/whole_model.md has the formulas.
Inputs are named as in neuron_file.INPUT_SQUARES: `attention` enters q, k and v, `attention_output` enters o, `ffn`
enters up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INPUTS = ("attention", "attention_output", "ffn")


@dataclass(frozen=True)
class InputChoice:
    """Which inputs x of a linear layer a token reads: those with |x_j - mean_j| norm_j > threshold.

    mean: float32 [in]; inputs that are not read count as their mean.
    norm: float32 [in], how much an input weighs in what the layer computes.
    threshold: below 0 every input is read.
    """

    mean: torch.Tensor
    norm: torch.Tensor
    threshold: float


@dataclass(frozen=True)
class LayerChoice:
    """What a decoded token reads of one decoder layer.

    inputs: by the names in INPUTS.
    neurons: the share of the neurons that are chosen by up, on average.
    neuron_threshold: of |up_i·x| a_i ||W_down[:, i]||, above which they are.
    down_threshold: of |h_i| ||W_down[:, i]||, above which the row of down is read; below 0 all rows are.
    """

    inputs: dict[str, InputChoice]
    neurons: float
    neuron_threshold: float
    down_threshold: float
