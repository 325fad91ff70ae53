"""Random weights and the distance between results."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from transformers_patches import kernels

OF_BITS = {8: kernels.INT8, 4: kernels.INT4}
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
    parts = zip((first, second), paired(first.data, second.data), paired(first.scales, second.scales), strict=True)
    return tuple(replace(weight, data=data, scales=scales) for weight, data, scales in parts)


def quantized_ffn(floats: list[Tensor], bits: int) -> list[kernels.QuantizedTensor]:
    """The last one, whose rows are summed up, with column scales of very different sizes."""
    *inputs, down = floats
    scales = torch.logspace(-2, 2, down.shape[1])[torch.randperm(down.shape[1])]
    return [
        *(kernels.quantize(weight, OF_BITS[bits]) for weight in inputs),
        kernels.quantize(down * scales, OF_BITS[bits], None, scales),
    ]


def double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]
