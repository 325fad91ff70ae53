"""ByteLadder: settings that read fewer and fewer bytes of all decoder layers, as the profiler found and measured them.

A decoded token reads only some inputs of the linear layers (those that are far from their mean and weigh much), chooses
neurons by `up`, and leaves out the rows of `down` whose activation turned out small. docs/whole_model.md has the formulas.
Inputs are named as in neuron_file.INPUT_SQUARES: `attention` enters q, k and v, `attention_output` enters o, `ffn`
enters up.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

from transformers_patches.errors import PartInferError
from transformers_patches.neurons.checks import FLOATS

INPUTS = ("attention", "attention_output", "ffn")
THRESHOLDS = (*INPUTS, "neurons", "down")
EVERYTHING = -1.0  # the threshold above which everything is
_MOST_RUNGS = 64
_STEP = 0.01  # of the shares of bytes that are tried for a bound
_SAME = 1e-6


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
    neuron_threshold: of |up_i·x| a_i ||W_down[:, i]||, above which they are; below 0 all are.
    down_threshold: of |h_i| ||W_down[:, i]||, above which the row of down is read; below 0 all rows are.
    """

    inputs: dict[str, InputChoice]
    neurons: float
    neuron_threshold: float
    down_threshold: float


@dataclass(frozen=True)
class Rung:
    """One setting of the ladder and what it costs, in nats per decoded token."""

    block_bytes: float  # share of the decoder layers' weight bytes that a decoded token reads, below 1
    nll: float  # rise over dense
    kl: float  # KL(dense || this)

    def __post_init__(self) -> None:
        numbers = (self.block_bytes, self.nll, self.kl)
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
            raise ValueError("expected finite numbers")
        if not 0 < self.block_bytes < 1:
            raise ValueError("expected shares of bytes between 0 and 1")

    @property
    def loss(self) -> float:
        return max(self.nll, self.kl, 0.0)


@dataclass(frozen=True)
class ByteLadder:
    """Settings from many bytes to few; between two of them everything is interpolated.

    rungs: fewer block_bytes one after the other.
    mean, norm: float [layers, in] for the names in INPUTS; stored in 16 bits.
    thresholds: float32 [rungs, layers] for the names in THRESHOLDS; below 0 everything is read.
    neurons: float32 [rungs, layers], the share of the neurons that are chosen.
    """

    rungs: list[Rung]
    mean: dict[str, torch.Tensor]
    norm: dict[str, torch.Tensor]
    thresholds: dict[str, torch.Tensor]
    neurons: torch.Tensor

    def __post_init__(self) -> None:
        """ValueError, with the reason, unless all parts fit together."""
        shares = [rung.block_bytes for rung in self.rungs]
        if not 1 <= len(shares) <= _MOST_RUNGS or any(a <= b for a, b in pairwise(shares)):
            raise ValueError(f"expected 1 to {_MOST_RUNGS} rungs of fewer and fewer bytes")
        for name, values in self.tensors().items():
            if values.dtype not in FLOATS or values.ndim != 2 or not values.numel():
                raise ValueError(f"{name} is {values.dtype} {list(values.shape)}, expected floats in two dimensions")
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} has NaN or Inf")
        for values in (*self.thresholds.values(), self.neurons):
            if len(values) != len(shares) or values.shape[1] != self.num_layers:
                raise ValueError(f"expected thresholds of {len(shares)} rungs and {self.num_layers} layers")
        for name in INPUTS:
            if self.mean[name].shape != self.norm[name].shape or len(self.mean[name]) != self.num_layers:
                raise ValueError(f"mean and norm of {name} differ in shape")
            if not bool((self.norm[name] >= 0).all()):
                raise ValueError(f"norm of {name} has values below 0")
        if not bool(((self.neurons >= 0) & (self.neurons <= 1)).all()):
            raise ValueError("neurons has values that are no shares")

    @property
    def num_layers(self) -> int:
        return self.neurons.shape[1]

    @property
    def least(self) -> float:
        """The block bytes of the last rung."""
        return self.rungs[-1].block_bytes

    def predict(self, block_bytes: float) -> float | None:
        """Nats per token; None for fewer bytes than any rung has. Fewer bytes never cost less than more."""
        known = [(1.0, 0.0)]
        for rung in self.rungs:
            known.append((rung.block_bytes, max(known[-1][1], rung.loss)))
        if block_bytes < self.least - _SAME:
            return None
        for (above, cheap), (below, dear) in pairwise(known):
            if block_bytes >= below - _SAME:
                part = min(1.0, max(0.0, (block_bytes - below) / (above - below)))
                return cheap * part + dear * (1 - part)
        return known[-1][1]

    def bytes_for(self, max_loss: float) -> float:
        """The fewest block bytes, in hundredths, whose predicted loss is at most max_loss, or else 1."""
        for hundredth in range(math.ceil(self.least / _STEP - _SAME), round(1 / _STEP)):
            if self.predict(hundredth * _STEP) <= max_loss:
                return round(hundredth * _STEP, 2)
        return 1.0

    def layer(self, block_bytes: float, number: int) -> LayerChoice:
        """What a decoded token reads of a layer. Fewer bytes than the last rung's mean the last rung."""
        below, part = self._place(block_bytes)
        thresholds = {name: _between(self._ends(self.thresholds[name], below, number), part) for name in THRESHOLDS}
        few, many = self._ends(self.neurons, below, number, everything=1.0)
        inputs = {
            name: InputChoice(self.mean[name][number].float(), self.norm[name][number].float(), thresholds[name])
            for name in INPUTS
        }
        neurons = few * (1 - part) + many * part
        return LayerChoice(inputs, neurons, thresholds["neurons"], thresholds["down"])

    def _place(self, block_bytes: float) -> tuple[int, float]:
        """The rung at or below some bytes, and how far they are on the way to the one above, from 0 to 1."""
        below = next((i for i, r in enumerate(self.rungs) if r.block_bytes <= block_bytes + _SAME), len(self.rungs) - 1)
        low = self.rungs[below].block_bytes
        high = self.rungs[below - 1].block_bytes if below else 1.0
        return below, min(1.0, max(0.0, (block_bytes - low) / (high - low)))

    @staticmethod
    def _ends(values: torch.Tensor, below: int, number: int, everything: float = EVERYTHING) -> tuple[float, float]:
        """A layer's values of a rung and of the one above it."""
        return float(values[below, number]), float(values[below - 1, number]) if below else everything

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that a neuron file holds; `described` is the rest."""
        held = {f"mean.{name}": values for name, values in self.mean.items()}
        held |= {f"norm.{name}": values for name, values in self.norm.items()}
        held |= {f"threshold.{name}": values for name, values in self.thresholds.items()}
        return held | {"neurons": self.neurons}

    def described(self) -> str:
        """The rungs as JSON."""
        return json.dumps([asdict(rung) for rung in self.rungs])

    @classmethod
    def read(cls, described: str, tensors: dict[str, torch.Tensor], source: str) -> ByteLadder:
        """The inverse of `described` and `tensors`; PartInferError, naming `source`, if they are damaged."""
        try:
            return cls(
                [Rung(**rung) for rung in json.loads(described)],
                {name: tensors[f"mean.{name}"] for name in INPUTS},
                {name: tensors[f"norm.{name}"] for name in INPUTS},
                {name: tensors[f"threshold.{name}"] for name in THRESHOLDS},
                tensors["neurons"],
            )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PartInferError(f"{source}: its byte ladder is damaged ({error}): make the file again") from None


def _between(ends: tuple[float, float], part: float) -> float:
    """A threshold between those of two rungs, of which either may read everything.

    part: 0 at the first, 1 at the second. Logarithms are interpolated. From "everything", which a threshold of 0 is as
    well, the threshold itself is: few scores lie near 0, so what is left out grows in proportion to it.
    """
    if part in (0.0, 1.0):
        return ends[int(part)]
    if max(ends) < 0:
        return EVERYTHING
    few, many = (max(end, 0.0) for end in ends)
    if few > 0 and many > 0:
        return math.exp(math.log(few) * (1 - part) + math.log(many) * part)
    return few * (1 - part) + many * part
