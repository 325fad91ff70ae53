"""The experts of a mixture in one native object, which computes all that a router chose for a token in a single call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformers_patches.kernels.layer import Projections


class ExpertTable:
    """Gated experts [n, H] of one kind. n neurons of each, N at most, H hidden.

    Needs the native kernels. Methods raise ValueError for arguments that don't fit.
    """

    def __init__(self, count: int, neurons: int, hidden: int, activation: str, native_code: int) -> None:
        """native_code: of the weights' format (`Projections.native_code`)."""
        self._native = torch.classes.partinfer.Experts(count, neurons, hidden, activation, native_code)

    def set(
        self,
        number: int,
        projections: Projections,
        biases: Sequence[Tensor | None] = (None, None),
        down_bias: Tensor | None = None,
    ) -> None:
        """Say where an expert's rows lie; they may be set again when they lie elsewhere.

        projections: gate, up and down, neuron-major.
        biases: of gate and of up, [n].
        down_bias: float32 [H].
        """
        p = projections
        self._native.set(number, p.weights, p.scales, p.column_scales, list(biases), down_bias)

    def set_size(self, number: int, size: Tensor | None) -> None:
        """From now on, an expert computes the neurons with the largest |up·x| size. size: float32 [n]; None: all."""
        self._native.set_size(number, size)

    def run(self, x: Tensor, chosen: Tensor, shares: Tensor, keep: int) -> tuple[Tensor, int]:
        """The sum of some experts' outputs for one token, each times its share; and how many neurons were computed.

        x: [..., H].
        chosen: int64, the experts' numbers.
        shares: floats, as many.
        keep: how many neurons are computed of an expert that has sizes.
        """
        return self._native.run(x, chosen, shares, keep)
