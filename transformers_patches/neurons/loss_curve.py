"""LossCurve: what it costs to decode with fewer bytes, as the profiler measured it on calibration texts.

A loss is how much the negative log-likelihood of a decoded token exceeds the dense model's, in nats. For texts that the
model would write itself, the mean Kullback-Leibler divergence from the dense model's predictions is the same, and it
varies much less if there are few of them. The larger of the two is what is predicted.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

import torch

from transformers_patches.errors import PartInferError

ALL, DEFAULT = "all", "default"  # which layers are sparse: all, or all but the first and last few
_MOST_POINTS = 64
_LARGEST_LOSS = 1e4  # nats per token; no float32 logits can cost as much by a mistake of the settings
_STEP = 0.01  # of the sparsities that are tried for a bound


@dataclass(frozen=True)
class LossPoint:
    """One setting and what it costs."""

    selection: str  # what chooses the neurons
    layers: str  # ALL or DEFAULT
    loaded: float  # gamma
    sparsity: float  # phi
    nll: float  # nats per token over dense
    kl: float  # nats per token, KL(dense || this)

    def __post_init__(self) -> None:
        numbers = [getattr(self, f.name) for f in fields(self) if f.name not in ("selection", "layers")]
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
            raise ValueError("expected finite numbers")
        if not isinstance(self.selection, str) or any(abs(n) > _LARGEST_LOSS for n in (self.nll, self.kl)):
            raise ValueError(f"expected the name of a selection, and losses up to {_LARGEST_LOSS:g} nats")
        if not 0 < self.sparsity <= 1 or not 0 < self.loaded <= 1 or self.layers not in (ALL, DEFAULT):
            raise ValueError(f"expected fractions and layers {ALL} or {DEFAULT}")

    @property
    def loss(self) -> float:
        return max(self.nll, self.kl, 0.0)


@dataclass(frozen=True)
class LossCurve:
    """The measured points, and what decoding needs at those where all layers are sparse and everything is loaded."""

    points: list[LossPoint]  # every setting that was measured
    thresholds: torch.Tensor  # float32 [points of `whole`, layers], of the scores that choose neurons
    gate_size: torch.Tensor | None  # float32 [layers, N], typical size of act(gate x); None for a plain FFN

    def __post_init__(self) -> None:
        if not 1 <= len(self.whole) <= len(self.points) <= _MOST_POINTS:
            raise ValueError(f"expected 1 to {_MOST_POINTS} points, some of them of all layers loaded whole")
        shares = [p.sparsity for p in self.whole]
        if any(low >= high for high, low in pairwise(shares)):
            raise ValueError("expected the points of all layers loaded whole from the largest sparsity down, each once")
        if len({(p.selection, p.layers, p.loaded, p.sparsity) for p in self.points}) < len(self.points):
            raise ValueError("expected every setting once")
        if self.thresholds.ndim != 2 or len(self.thresholds) != len(self.whole):
            raise ValueError(f"expected thresholds for {len(self.whole)} points, got {list(self.thresholds.shape)}")
        for name, values in (("thresholds", self.thresholds), ("gate_size", self.gate_size)):
            if values is None:
                continue
            if values.dtype != torch.float32:
                raise ValueError(f"{name} has {values.dtype}, expected floats")
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} has NaN or Inf")
            if bool((values < 0).any()):
                raise ValueError(f"{name} has values below 0")

    @property
    def whole(self) -> list[LossPoint]:
        """The points of `up` over all layers, everything loaded, from the largest sparsity down."""
        return [p for p in self.points if (p.selection, p.layers, p.loaded) == ("up", ALL, 1.0)]

    def predict(self, selection: str, layers: str, loaded: float, sparsity: float) -> float | None:
        """The loss of a setting in nats per token; None if nothing near it was measured.

        Between measured points it is interpolated: over the computed share of what is loaded, then over what is loaded.
        """
        if selection != "up":
            same = [p for p in self.points if (p.selection, p.layers) == (selection, layers)]
            near = [p for p in same if abs(p.loaded - loaded) < 1e-6 and abs(p.sparsity - sparsity) < 1e-6]
            return near[0].loss if near else None
        curves: dict[float, list[LossPoint]] = {}
        for point in self.points:
            if (point.selection, point.layers) == (selection, layers):
                curves.setdefault(point.loaded, []).append(point)
        above = min((known for known in curves if known >= loaded - 1e-6), default=None)
        below = max((known for known in curves if known <= loaded + 1e-6), default=None)
        if above is None or below is None:
            return None
        losses = [_interpolate(curves[known], sparsity / loaded) for known in (below, above)]
        if None in losses:
            return None
        part = 0.0 if above == below else (loaded - below) / (above - below)
        return losses[0] * (1 - part) + losses[1] * part

    def sparsity_for(self, max_loss: float) -> float:
        """The smallest measured share of all layers' FFN bytes whose predicted loss is at most max_loss, or else 1."""
        tried = round(min(p.sparsity for p in self.whole) / _STEP)
        for hundredth in range(tried, round(1 / _STEP)):
            loss = self.predict("up", ALL, 1.0, hundredth * _STEP)
            if loss is not None and loss <= max_loss:
                return round(hundredth * _STEP, 2)
        return 1.0

    def thresholds_for(self, sparsity: float) -> torch.Tensor | None:
        """float32 [layers], the scores above which neurons are computed; None outside of what was measured.

        Logarithms are interpolated. 0 where a layer has none.
        """
        points = self.whole
        for (low, at_low), (high, at_high) in zip(enumerate(points[1:], 1), enumerate(points[:-1]), strict=True):
            if at_low.sparsity - 1e-6 <= sparsity <= at_high.sparsity + 1e-6:
                part = (sparsity - at_low.sparsity) / (at_high.sparsity - at_low.sparsity)
                below, above = self.thresholds[low], self.thresholds[high]
                between = (below.log() * (1 - part) + above.log() * part).exp()
                return torch.where((below > 0) & (above > 0), between, 0.0)
        return None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that a neuron file holds; `described` is the rest."""
        held = {"thresholds": self.thresholds}
        return held if self.gate_size is None else held | {"gate_size": self.gate_size}

    def described(self) -> str:
        """The points as JSON."""
        return json.dumps([asdict(point) for point in self.points])

    @classmethod
    def read(cls, described: str, tensors: dict[str, torch.Tensor], source: str) -> LossCurve:
        """The inverse of `described` and `tensors`; PartInferError, naming `source`, if they are damaged."""
        try:
            points = [LossPoint(**point) for point in json.loads(described)]
            held = {name: values.float() if values.is_floating_point() else values for name, values in tensors.items()}
            return cls(points, held["thresholds"], held.get("gate_size"))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PartInferError(
                f"{source}: its loss curve is damaged ({' '.join(str(error).split())[:200]}): make the file again"
            ) from None


def _interpolate(points: list[LossPoint], share: float) -> float | None:
    """The loss at a computed share of what is loaded. A smaller share never costs less than a larger one."""
    known = sorted(((p.sparsity / p.loaded, p.loss) for p in points), reverse=True)
    if known[0][0] < 1:
        known.insert(0, (1.0, 0.0))  # everything that is loaded is computed, and everything is loaded
    most, before = 0.0, None
    for at, loss in known:
        most = max(most, loss)
        if abs(at - share) < 1e-6:
            return most
        if before is not None and at < share:
            part = (share - at) / (before[0] - at)
            return most * (1 - part) + before[1] * part
        before = (at, most)
    return None
