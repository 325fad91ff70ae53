"""Counts of absolute values in fine bins, for quantiles over more values than fit in memory."""

from __future__ import annotations

import math

import torch

from transformers_patches.token_ids import check_finite

_DROPPED_BITS = 13  # of float32's 31 without the sign: bfloat16 and float16 lose nothing, float32 has 10 bits of 23
_BINS = 2 ** (31 - _DROPPED_BITS)


class Histogram:
    """|x| of everything that was added.

    A bin holds the values whose float32 patterns begin alike: patterns of values without a sign are in their order.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self._sums: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """Count all elements. Raises PartInferError if one is not finite."""
        check_finite(x)
        patterns = x.detach().float().abs().flatten().cpu().view(torch.int32) >> _DROPPED_BITS
        self.counts += torch.bincount(patterns, minlength=_BINS)
        self._sums = None

    def quantile(self, share: float) -> float:
        """The smallest edge of a bin such that at least this share of the values is not above it; -1 for a share of 0."""
        if share <= 0:
            return -1.0
        if self._sums is None:
            self._sums = self.counts.cumsum(0)
        wanted = min(math.ceil(share * int(self._sums[-1])), int(self._sums[-1]))
        number = int(torch.searchsorted(self._sums, wanted))
        last = ((number + 1) << _DROPPED_BITS) - 1  # the largest pattern of the bin
        return float(torch.tensor(last, dtype=torch.int32).view(torch.float32))
