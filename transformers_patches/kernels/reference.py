"""Every operation in plain PyTorch: for machines without the native kernels, for GPUs, and for tests to compare with.

Functions have the arguments and results of those in operations.py, where they are documented.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from transformers_patches.kernels import blockwise
from transformers_patches.kernels.layer import ActiveNeurons, AttentionLayer, ByInput, Projections
from transformers_patches.kernels.quantization import (
    QuantizedTensor,
    Weight,
    dequantize,
    join_planes,
    quantize,
    split_planes,
)
from transformers_patches.kernels.screening import screened_linear

__all__ = [
    "ACTIVATIONS",
    "add_norm",
    "attention_step",
    "by_input",
    "core_counts",
    "dense_ffn",
    "dequantize",
    "ffn",
    "join_planes",
    "linear",
    "most_marked",
    "norm",
    "quantize",
    "screened_linear",
    "split_planes",
    "sum_of_squares",
    "typical_scale",
    "weighted_rows",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

Rows = slice | Tensor


def ffn(x: Tensor, active: ActiveNeurons) -> tuple[Tensor, Tensor]:
    """The gated or plain FFN over active neurons, or over those that each token chooses among them."""
    weights = _FfnWeights(active, x)
    if active.size is None:
        y, computed = weights.all_active(), torch.full((x[..., 0].numel(),), active.count)
    else:
        y, computed = weights.chosen_per_token()
    y = y.to(x.dtype)
    for vector in active.added:
        y = y + vector
    return y, computed


class _FfnWeights:
    """The weights of an FFN on x's device, and the type to compute in: their own, or x's if they are quantised."""

    def __init__(self, active: ActiveNeurons, x: Tensor) -> None:
        self.active, self.device = active, x.device
        self.weights = [active.projections.weight(number) for number in range(len(active.projections.weights))]
        self.x = x.to(_dtype_of(self.weights[0], x))
        self.act = ACTIVATIONS[active.activation] if isinstance(active.activation, str) else active.activation

    def rows(self, number: int, rows: Rows) -> Weight:
        """Some rows of one of the weights: a view for a slice."""
        return _on(self.weights[number], rows, self.device)

    def product(self, x: Tensor, number: int, rows: Rows) -> Tensor:
        """x [..., H] times some rows of an input projection, plus their biases."""
        bias = self.active.projections.biases[number]
        bias = None if bias is None else _on(bias, rows, self.device).to(x.dtype)
        return blockwise.project(x, self.rows(number, rows), bias, dequantize)

    def combine(self, h: Tensor, rows: Rows) -> Tensor:
        """h [..., n] times some rows of the output projection."""
        return blockwise.combine(h, self.rows(-1, rows), dequantize)

    def all_active(self) -> Tensor:
        """The prefix is a slice, which is not copied; listed rows are."""
        y = torch.zeros_like(self.x)
        for rows in self.parts():
            h = self.act(self.product(self.x, 0, rows))
            if self.active.gated:
                h = h * self.product(self.x, 1, rows)
            y = y + self.combine(h, rows)
        return y

    def parts(self) -> list[Rows]:
        """The prefix and the list, without what is empty."""
        prefix, index = self.active.prefix, self.active.index
        parts: list[Rows] = [slice(0, prefix)] if prefix else []
        return parts if index is None or len(index) == 0 else [*parts, index.long()]

    def chosen_per_token(self) -> tuple[Tensor, Tensor]:
        """One token after the other: the product to choose by for all candidates, the rest for the chosen neurons."""
        active, candidates = self.active, self.candidates()
        size = _on(active.size, candidates, self.device)
        by_up = active.gated and not active.by_gate
        y, computed = torch.empty_like(self.x), []
        tokens = zip(self.x.view(-1, 1, y.shape[-1]), y.view(-1, 1, y.shape[-1]), strict=True)
        for x, out in tokens:
            values = self.chosen_by(x, candidates, by_up)  # [1, C]
            kept = _largest(values[0].float().abs() * size, active.keep_count, active.threshold)
            rows, h = kept if isinstance(candidates, slice) else candidates[kept.to(candidates.device)], values[:, kept]
            if by_up:
                h = self.act(self.product(x, 0, rows)) * h
            elif active.gated:
                h = h * self.product(x, 1, rows)
            if active.down_size is not None:
                h = h * (h.float().abs() * _on(active.down_size, rows, self.device) > active.down_threshold)
            out.copy_(self.combine(h, rows))
            computed.append(len(kept))
        return y, torch.tensor(computed, dtype=torch.int64)

    def chosen_by(self, x: Tensor, candidates: Rows, by_up: bool) -> Tensor:
        """The product that neurons are chosen by: [1, C]."""
        if self.active.up is not None:
            return by_input(x, self.active.up)[0]
        return self.product(x, 1, candidates) if by_up else self.act(self.product(x, 0, candidates))

    def candidates(self) -> Rows:
        """The active neurons as one slice, or as indices int64 [C]."""
        prefix, index = self.active.prefix, self.active.index
        if index is None:
            return slice(0, prefix)
        return torch.cat([torch.arange(prefix, device=index.device), index.long()])


def _on(weight: Weight, rows: Rows, device: torch.device) -> Weight:
    """Some rows of a weight or bias on a device; indices may be anywhere."""
    return weight[rows if isinstance(rows, slice) else rows.to(weight.device)].to(device)


def _largest(scores: Tensor, count: int | None, threshold: float) -> Tensor:
    """Positions of the `count` largest scores [C], or of those above the threshold; never of zeros."""
    kept = scores.topk(count).indices if count is not None else (scores > threshold).nonzero().squeeze(1)
    return kept[scores[kept] > 0]


def _dtype_of(weight: Weight, x: Tensor) -> torch.dtype:
    return x.dtype if isinstance(weight, QuantizedTensor) else weight.dtype


def _floats(weight: Weight, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, dtype) if isinstance(weight, QuantizedTensor) else weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    dtype = _dtype_of(weight, x)
    return F.linear(x.to(dtype), _floats(weight, dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def weighted_rows(h: Tensor, weight: Weight) -> Tensor:
    dtype = _dtype_of(weight, h)
    return (h.to(dtype) @ _floats(weight, dtype)).to(h.dtype)


def by_input(x: Tensor, layer: ByInput) -> tuple[Tensor, Tensor]:
    apart = x.float() - layer.mean.to(x.device)
    read = torch.ones_like(apart, dtype=torch.bool)
    if layer.threshold >= 0:
        read = apart.abs() * layer.norm.to(x.device) > layer.threshold
    product = blockwise.combine((apart * read).to(_dtype_of(layer.weight, x)), layer.weight.to(x.device), dequantize)
    return (product.float() + layer.constant.to(x.device)).to(x.dtype), read.sum(-1).flatten().cpu()


def attention_step(
    x: Tensor,
    delta: Tensor | None,
    layer: AttentionLayer,
    rope: tuple[Tensor, Tensor] | tuple[None, None],
    cache: tuple[Tensor, Tensor],
    length: int,
) -> tuple[Tensor, Tensor]:
    x = x if delta is None else x + delta
    (keys, values), (cosine, sine) = cache, rope
    inputs = norm(x, layer.norm, layer.norm_bias, layer.eps)
    q, k, v = (part.view(-1, keys.shape[-1]) for part in _queries_keys_values(inputs, layer))  # [heads, D]
    if layer.q_norm is not None:
        q, k = norm(q, layer.q_norm, None, layer.eps), norm(k, layer.k_norm, None, layer.eps)
    if cosine is not None:
        q, k = _rotated(q, cosine, sine), _rotated(k, cosine, sine)
    keys[0, :, length] = k
    values[0, :, length] = v
    first = max(0, length + 1 - layer.window) if layer.window else 0
    attended = F.scaled_dot_product_attention(
        q[None, :, None],
        keys[:, :, first : length + 1],
        values[:, :, first : length + 1],
        scale=layer.scale,
        enable_gqa=True,
    )
    attended = attended.reshape(*x.shape[:-1], -1)
    x = x + (
        _projected(attended, layer.projections, 3) if layer.inputs is None else by_input(attended, layer.inputs[1])[0]
    )
    return x, norm(x, layer.next_norm, layer.next_norm_bias, layer.eps)


def _queries_keys_values(x: Tensor, layer: AttentionLayer) -> list[Tensor]:
    if layer.inputs is None:
        return [_projected(x, layer.projections, number) for number in range(3)]
    product, width = by_input(x, layer.inputs[0])[0], len(layer.inputs[1].weight)  # all query heads
    keys = (product.shape[-1] - width) // 2
    return list(product.split([width, keys, keys], dim=-1))


def _projected(x: Tensor, projections: Projections, number: int) -> Tensor:
    return linear(x, projections.weight(number), projections.biases[number])


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of heads [n, D], whose halves make up the pairs; cosine and sine [..., D] of one position."""
    half = heads.shape[-1] // 2
    swapped = torch.cat([-heads[:, half:], heads[:, :half]], dim=-1)
    return heads * cosine.view(-1) + swapped * sine.view(-1)


def dense_ffn(x: Tensor, projections: Projections, activation: str) -> Tensor:
    h = ACTIVATIONS[activation](_projected(x, projections, 0))
    if len(projections.weights) == 2:
        return _projected(h, projections, 1)
    return _projected(h * _projected(x, projections, 1), projections, 2)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return norm(x + delta, weight, bias, eps)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32 (Zhang and Sennrich 2019); with a bias LayerNorm."""
    if bias is not None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def core_counts(h: Tensor, token_sparsity: float) -> Tensor:
    tokens, loaded = h.shape
    counts = torch.zeros(loaded, dtype=torch.int64, device=h.device)
    if tokens == 0:
        return counts
    k = min(int(token_sparsity * int((h > 0).sum()) / tokens), loaded)
    values, marked = h.topk(k, dim=1, sorted=False)
    return counts.scatter_add_(0, marked.flatten(), (values > 0).flatten().long())


def most_marked(counts: Tensor, priority: Tensor, first: int, wanted: int) -> Tensor:
    keys = counts * (int(priority.max()) + 1) - priority
    chosen = keys[first:].topk(wanted, sorted=False).indices + first
    return chosen.sort().values.int()


def sum_of_squares(values: Tensor) -> Tensor:
    return values.to(torch.float32, copy=True).square_().sum(0)


def typical_scale(sums: Tensor, tokens: int, prior: Tensor | None, prior_tokens: int, norms: Tensor) -> Tensor:
    known = sums.mean() / max(tokens, 1) if prior is None else prior.square()
    return known.mul(prior_tokens).add(sums).div_(tokens + prior_tokens).sqrt_().mul_(norms)
