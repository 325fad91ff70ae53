"""Random weights and the distance between results."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from transformers_patches import kernels
from transformers_patches.kernels import ActiveNeurons, Projections, Weight, reference

OF_BITS = {8: kernels.INT8, 4: kernels.INT4}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(result: Tensor, expected: Tensor) -> float:
    """Relative error in the norm."""
    return ((result.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def weights(count: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(rows, columns) / columns**0.5).to(dtype) for _ in range(count)]


def unsorted_index(prefix: int, rows: int, count: int) -> Tensor:
    return torch.randperm(rows - prefix)[:count].add(prefix).int()


def paired(first: Weight, second: Weight) -> tuple[Weight, Weight]:
    """The same two matrices with their rows interleaved in memory."""
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


def active(
    weights: list[Weight],
    prefix: int,
    index: Tensor | None = None,
    activation: str | None = None,
    biases: list[Tensor | None] | None = None,
    **choice,
) -> ActiveNeurons:
    """weights: gate, up and down (activation silu unless given), or fc1 and fc2 (relu); biases: None for all of them."""
    projections = Projections.of(list(zip(weights, biases or [None] * len(weights), strict=True)))
    return ActiveNeurons(projections, activation or ("silu" if len(weights) == 3 else "relu"), prefix, index, **choice)


def ffn(x: Tensor, *arguments, **options) -> Tensor:
    """The output of the native FFN, or of the reference where a test's variant is that."""
    return kernels.ffn(x, active(*arguments, **options))[0]


def exact_ffn(x: Tensor, weights: list[Weight], *arguments, biases: list[Tensor | None] | None = None) -> Tensor:
    """The same in PyTorch in float64, over what quantised weights stand for."""
    floats = [kernels.dequantize(w) if isinstance(w, kernels.QuantizedTensor) else w for w in weights]
    biases = [None if bias is None else bias.double() for bias in biases or [None] * len(weights)]
    return reference.ffn(x.double(), active(double(*floats), *arguments, biases=biases))[0]
