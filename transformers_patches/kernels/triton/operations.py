"""The operations of `kernels.operations` that decode, by Triton. T tokens, H hidden, n active neurons or candidates.

Products are summed in float32 and rounded once, at the end.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from transformers_patches.kernels.layer import ActiveNeurons, ByInput
from transformers_patches.kernels.quantization import QuantizedTensor, Weight
from transformers_patches.kernels.reference import ACTIVATIONS
from transformers_patches.kernels.triton import launch
from transformers_patches.kernels.triton.arguments import Finish, Matrix, Positions

NOTHING = Finish(None, None, None, None, 0.0)


def reads(weight: Weight, x: Tensor) -> bool:
    """Whether the kernels can multiply a weight with x: both are on one device, the format is known, rows contiguous."""
    if isinstance(weight, QuantizedTensor):
        known = weight.format.native is not None and not weight.in_planes
        return known and weight.device == x.device and weight.data.stride(-1) == 1
    return weight.device == x.device and weight.stride(-1) == 1


def computes(x: Tensor, active: ActiveNeurons) -> bool:
    """Whether `ffn` can compute this: it is known, and everything is on x's device."""
    beside = (active.index, active.size, active.down_size, *active.added)
    if any(part is not None and part.device != x.device for part in beside):
        return False
    projections = active.projections
    searched = active.size is not None and active.keep_count is not None
    weights = [projections.weight(number) for number in range(len(projections.weights))]
    return (
        active.activation in ACTIVATIONS
        and active.on_disk is None
        and not (searched and active.count > launch.MOST_SCORES)
        and all(reads(weight, x) for weight in weights)
    )


def ffn(x: Tensor, active: ActiveNeurons) -> tuple[Tensor, Tensor]:
    """As `kernels.ffn`, whose counts are on the CPU: this waits for the device."""
    y, counts = ffn_on_device(x, active)
    return y, counts.long().cpu()


def ffn_on_device(x: Tensor, active: ActiveNeurons, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `kernels.ffn`, but the counts, int32 [T], stay on x's device, and the processor waits for nothing.

    threshold: float32 [1] on the device, in the place of active.threshold.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if active.size is None:
        h, positions = _all_active(rows, active), _positions(active)
        counts = torch.full((len(rows),), active.count, dtype=torch.int32, device=x.device)
    else:
        h, positions = _chosen(rows, active, threshold)
        counts = positions.counts
    y = torch.empty_like(rows)
    _sums(h, active.projections.weight(-1), positions, None, y)
    y = y.view(x.shape)
    for vector in active.added:
        y = y + vector
    return y, counts


def _positions(active: ActiveNeurons) -> Positions:
    index = active.index if active.index is not None and len(active.index) else None
    return Positions(active.count, active.prefix, index, None, None)


def _matrix(active: ActiveNeurons, number: int) -> Matrix:
    bias = active.projections.biases[number]
    return Matrix.of(active.projections.weight(number), None if bias is None else bias.detach())


def _floats(x: Tensor, count: int) -> Tensor:
    return torch.empty(len(x), count, dtype=torch.float32, device=x.device)


def _all_active(x: Tensor, active: ActiveNeurons) -> Tensor:
    """h [T, n]: gate and up in one pass."""
    h = _floats(x, active.count)
    weights = [_matrix(active, number) for number in range(2 if active.gated else 1)]
    launch.products(x, weights, _positions(active), NOTHING, active.activation, h)
    return h


def _chosen(x: Tensor, active: ActiveNeurons, threshold: Tensor | None) -> tuple[Tensor, Positions]:
    """h [T, n] where tokens have chosen, and the positions that they have chosen."""
    values, scores = _scored(x, active)
    if active.keep_count is None and threshold is None:
        threshold = torch.full((1,), active.threshold, dtype=torch.float32, device=x.device)
    chosen, counts = launch.choose(scores, active.keep_count, threshold)
    positions = _positions(active)._replace(chosen=chosen, counts=counts)
    if not active.gated:
        return values, positions
    h, other = _floats(x, active.count), 1 if active.by_gate else 0
    finish = NOTHING._replace(times=values, down_size=active.down_size, down_threshold=active.down_threshold)
    activation = None if active.by_gate else active.activation
    launch.products(x, [_matrix(active, other)], positions, finish, activation, h)
    return h, positions


def _scored(x: Tensor, active: ActiveNeurons) -> tuple[Tensor, Tensor]:
    """The product that neurons are chosen by and its scores, float32 [T, n] each."""
    if active.up is not None:
        values = _by_input(x, active.up, torch.float32)[0]
        return values, values.abs() * active.size
    values, scores = _floats(x, active.count), _floats(x, active.count)
    by_up = active.gated and not active.by_gate
    finish = NOTHING._replace(size=active.size, scores=scores)
    activation = None if by_up else active.activation
    launch.products(x, [_matrix(active, 1 if by_up else 0)], _positions(active), finish, activation, values)
    return values, scores


def _sums(factors: Tensor, weight: Weight, positions: Positions, constant: Tensor | None, out: Tensor) -> None:
    columns = weight.column_scales if isinstance(weight, QuantizedTensor) else None
    launch.sums(factors, Matrix.of(weight), positions, (columns, constant), out)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty(len(rows), len(weight))
    launch.products(rows, [Matrix.of(weight, bias)], Positions(len(weight), 0, None, None, None), NOTHING, None, out)
    return out.view(*x.shape[:-1], len(weight))


def weighted_rows(h: Tensor, weight: Weight) -> Tensor:
    rows = h.reshape(-1, h.shape[-1]).contiguous()
    out = h.new_empty(len(rows), weight.shape[1])
    _sums(rows, weight, Positions(len(weight), 0, None, None, None), None, out)
    return out.view(*h.shape[:-1], weight.shape[1])


def by_input(x: Tensor, layer: ByInput) -> tuple[Tensor, Tensor]:
    """As `kernels.by_input`, whose counts are on the CPU: this waits for the device."""
    y, counts = by_input_on_device(x, layer)
    return y, counts.long().cpu()


def by_input_on_device(x: Tensor, layer: ByInput) -> tuple[Tensor, Tensor]:
    """As `kernels.by_input`, but the counts, int32 [T], stay on x's device, and the processor waits for nothing."""
    y, counts = _by_input(x.reshape(-1, x.shape[-1]).contiguous(), layer, x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1]), counts


def _by_input(x: Tensor, layer: ByInput, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[T, out] of a type, and the counts."""
    layer = replace(layer, weight=layer.weight if isinstance(layer.weight, QuantizedTensor) else layer.weight.detach())
    mean, norm, constant = (vector.to(x.device) for vector in layer.vectors)  # where they are on the CPU
    apart, scores = launch.inputs(x, mean, norm)
    positions = Positions(len(layer.weight), 0, None, None, None)
    counts = torch.full((len(x),), len(layer.weight), dtype=torch.int32, device=x.device)
    if layer.threshold >= 0:
        bound = torch.full((1,), layer.threshold, dtype=torch.float32, device=x.device)
        chosen, counts = launch.choose(scores, None, bound)
        positions = positions._replace(chosen=chosen, counts=counts)
    out = torch.empty(len(x), layer.weight.shape[1], dtype=dtype, device=x.device)
    _sums(apart, layer.weight, positions, constant, out)
    return out, counts
