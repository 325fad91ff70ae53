"""Spreads a budget of bytes over all groups of all layers, so that the sum of the predicted losses is least."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from profiler.ladder.options import Option

_STEPS = 80  # halvings of the multiplier's range


def allocate(groups: Sequence[Sequence[Option]], weights: float) -> list[Option] | None:
    """One option for each group, that together read at most `weights` weights; None if no choice reads so few.

    Every group takes the option with the least loss + λ weights. One multiplier λ for all is found by bisection, so
    that no exchange between two groups would lose less for the same weights (but for the steps between options).
    """
    ordered = [sorted(group, key=lambda option: option.weights) for group in groups]  # of equals, the smallest is taken
    longest = max(map(len, ordered))
    losses, sizes = torch.full((2, len(ordered), longest), torch.inf, dtype=torch.float64)
    for row, group in enumerate(ordered):
        losses[row, : len(group)] = torch.tensor([option.loss for option in group])
        sizes[row, : len(group)] = torch.tensor([option.weights for option in group], dtype=torch.float64)
    best = sizes.argmin(1)
    if float(sizes.amin(1).sum()) > weights:
        return None
    sizes_of_all = sum(group[-1].weights for group in ordered)
    low, high = -60.0, 60.0  # logarithms of λ, in nats per share of all weights
    for _ in range(_STEPS):
        middle = (low + high) / 2
        chosen = (losses + math.exp(middle) * sizes / sizes_of_all).argmin(1)
        if float(sizes.gather(1, chosen[:, None]).sum()) <= weights:
            high, best = middle, chosen
        else:
            low = middle
    return [group[int(index)] for group, index in zip(ordered, best, strict=True)]
