"""Random weights and the distance between results."""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_patches import kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(result: Tensor, expected: Tensor) -> float:
    """Relative error in the norm."""
    return ((result.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def weights(count: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(rows, columns) / columns**0.5).to(dtype) for _ in range(count)]


def unsorted_index(prefix: int, rows: int, count: int) -> Tensor:
    return torch.randperm(rows - prefix)[:count].add(prefix).int()


def paired(first: kernels.Weight, second: kernels.Weight) -> tuple[kernels.Weight, kernels.Weight]:
    """The same two matrices with rows that take turns in memory."""
    if isinstance(first, Tensor):
        return torch.stack([first, second], dim=1).unbind(1)
    parts = zip(paired(first.data, second.data), paired(first.scales, second.scales), strict=True)
    return tuple(kernels.QuantizedTensor(data, scales, first.bits) for data, scales in parts)


def double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]
