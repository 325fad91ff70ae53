"""Every operation by the compiled library, for tensors on the CPU. library.py loads it before any of these is called.

Functions have the arguments and results of those in operations.py, where they are documented.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from transformers_patches.kernels import blockwise
from transformers_patches.kernels.formats import WeightFormat
from transformers_patches.kernels.layer import ActiveNeurons, AttentionLayer, ByInput, Projections
from transformers_patches.kernels.quantization import QuantizedTensor, Weight, check_column_weights
from transformers_patches.kernels.screening import Needed, Screen

_OPS = torch.ops.partinfer  # called by their `default` overload, which saves looking for one


def ffn(x: Tensor, active: ActiveNeurons) -> tuple[Tensor, Tensor]:
    operation, arguments, counts, hidden = active.native_call or _prepare_ffn(active)
    if counts is None:
        y, computed = operation(x, *arguments)
    else:
        y = operation(x, *arguments)
        computed = counts if x.numel() == hidden else counts.expand(x.numel() // hidden)
    for vector in active.added:
        y = y + vector
    return y, computed


def _prepare_ffn(active: ActiveNeurons) -> tuple[Callable, tuple, Tensor | None, int]:
    """What computes an FFN: the operation, its arguments after x, the count per token unless tokens choose, and H.

    The result is kept. There is an operation for each kind of weights and of choice, with flat arguments: lists of
    tensors, or arguments that most calls leave empty, would cost every call microseconds.
    """
    p, hidden = active.projections, active.projections.weight(0).shape[1]
    weights = [part for pair in zip(p.weights, p.scales, strict=True) for part in pair] if p.format else list(p.weights)
    if not active.gated:
        weights.insert(2 if p.format else 1, p.biases[0])
    if p.format:
        weights += [p.column_scales, p.native_code]
    name = ("quant_sparse_ffn" if p.format else "sparse_ffn") + ("" if active.gated else "_plain")
    if active.size is None:
        choice, biases = (active.prefix, active.index), p.biases[:2] if active.gated else []
        counts = torch.tensor([active.count])
    else:
        keep_count = -1 if active.keep_count is None else active.keep_count
        choice, biases = (active.prefix, active.index, active.size, keep_count, active.threshold), []
        counts, name = None, name + ("_by_up" if active.gated else "_by_size")
    arguments = (*weights, *choice, active.activation, *biases)
    call = getattr(_OPS, name).default, arguments, counts, hidden
    object.__setattr__(active, "native_call", call)
    return call


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        if weight.in_planes:
            return blockwise.project(x, weight, bias, dequantize)
        return _OPS.quant_linear.default(x, weight.data, weight.scales, weight.native_code, bias)
    return _OPS.linear.default(x, weight, bias)


def weighted_rows(h: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        return _OPS.quant_weighted_rows.default(h, weight.data, weight.scales, weight.column_scales, weight.native_code)
    return _OPS.weighted_rows.default(h, weight)


def by_input(x: Tensor, layer: ByInput) -> tuple[Tensor, Tensor]:
    return _OPS.by_input.default(x, *layer.parts, layer.vectors, layer.threshold)


def screened_linear(x: Tensor, weight: Weight, screen: Screen, needed: Needed) -> tuple[Tensor, Tensor]:
    whole = None if isinstance(weight, QuantizedTensor) else weight
    return _OPS.screened_linear.default(x, screen.data, screen.scales, screen.errors, whole, *needed.arguments)


def split_planes(weight: QuantizedTensor) -> QuantizedTensor:
    data = torch.empty(2, len(weight), weight.shape[1] // 2, dtype=torch.uint8)
    _OPS.split_planes.default(weight.data, data)
    return replace(weight, data=data)


def join_planes(weight: QuantizedTensor) -> QuantizedTensor:
    data = torch.empty(weight.shape, dtype=torch.int8)
    _OPS.join_planes.default(weight.data, data)
    return replace(weight, data=data)


def quantize(weight: Tensor, weight_format: WeightFormat, column_weights: Tensor | None) -> QuantizedTensor:
    check_column_weights(column_weights, weight.shape[1])
    packed = QuantizedTensor.empty(*weight.shape, weight_format)
    weights = None if column_weights is None else column_weights.cpu().contiguous()
    _OPS.quantize.default(weight.contiguous(), packed.native_code, weights, packed.data, packed.scales)
    return packed


def dequantize(weight: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    weight = join_planes(weight) if weight.in_planes else weight
    out = torch.empty(weight.shape, dtype=dtype) if out is None else out
    _OPS.dequantize.default(weight.data, weight.scales, weight.native_code, out)
    return out if weight.column_scales is None else out.mul_(weight.column_scales)


def attention_step(
    x: Tensor,
    delta: Tensor | None,
    layer: AttentionLayer,
    rope: tuple[Tensor, Tensor] | tuple[None, None],
    cache: tuple[Tensor, Tensor],
    length: int,
) -> tuple[Tensor, Tensor]:
    p = layer.projections
    weights = (p.weights, p.scales, p.biases, p.native_code)
    return _OPS.attention_step.default(
        x, delta, *layer.norm_arguments, *weights, *rope, *cache, length, layer.window, layer.scale
    )


def dense_ffn(x: Tensor, projections: Projections, activation: str) -> Tensor:
    p = projections
    return _OPS.dense_ffn.default(x, p.weights, p.scales, p.biases, p.native_code, activation)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _OPS.add_norm.default(x, delta, weight, bias, eps)


def core_counts(h: Tensor, token_sparsity: float) -> Tensor:
    return _OPS.core_counts.default(h, token_sparsity)


def most_marked(counts: Tensor, priority: Tensor, first: int, wanted: int) -> Tensor:
    return _OPS.most_marked.default(counts, priority, first, wanted)


def sum_of_squares(values: Tensor) -> Tensor:
    return _OPS.sum_of_squares.default(values)


def typical_scale(sums: Tensor, tokens: int, prior: Tensor | None, prior_tokens: int, norms: Tensor) -> Tensor:
    return _OPS.typical_scale.default(sums, tokens, prior, prior_tokens, norms)
