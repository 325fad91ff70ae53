"""Paired bootstrap confidence intervals (Efron 1979, percentile method) over the examples of an evaluation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CONFIDENCE = 0.95


class Bootstrap:
    """Resamples of `count` examples. All methods share them, which makes differences paired."""

    def __init__(self, count: int, resamples: int = 1000, seed: int = 0) -> None:
        self.indices = np.random.default_rng(seed).integers(0, count, size=(resamples, count))  # [resamples, count]

    def ratio_interval(
        self, sums: np.ndarray, weights: np.ndarray, transform: Callable[[np.ndarray], np.ndarray] = np.asarray
    ) -> list[float]:
        """The interval [low, high] of transform(sum of sums / sum of weights).

        sums, weights: float [count], one of each per example; for a mean per token, the weights are token counts
        """
        ratios = transform(sums[self.indices].sum(1) / weights[self.indices].sum(1))
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(ratios, [tail, 1 - tail])
        return [float(low), float(high)]
