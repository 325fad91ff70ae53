"""The memory's bandwidth: the limit for kernels that are bound by it."""

from __future__ import annotations

import time

import torch


def bandwidth_probe(ops, nbytes: int, repetitions: int) -> float:
    """Bytes per second read from a buffer of nbytes: the best of the repetitions.

    ops: None measures a sum in PyTorch.
    """
    buffer = torch.empty(nbytes // 8, dtype=torch.int64)
    if ops is not None:
        ops.advise_huge_pages(buffer)
    buffer.fill_(1)
    return max(buffer.nbytes / _timed_read(ops, buffer) for _ in range(repetitions))


def _timed_read(ops, buffer: torch.Tensor) -> float:
    if ops is not None:
        return ops.timed_read(buffer)
    start = time.perf_counter()
    buffer.sum()
    return time.perf_counter() - start
