"""What the native kernels compute, in plain PyTorch: the path without a compiler, and what tests compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from transformers_patches.kernels.quantization import QuantizedTensor, dequantize

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

Weight = Tensor | QuantizedTensor


def rows_of(weight: Weight, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of a float or quantised weight as floats."""
    if isinstance(weight, QuantizedTensor):
        return dequantize(weight[rows], dtype)
    return weight[rows]


def _dtype_of(weight: Weight, x: Tensor) -> torch.dtype:
    return x.dtype if isinstance(weight, QuantizedTensor) else weight.dtype


def _active_parts(prefix: int, index: Tensor | None) -> list[slice | Tensor]:
    """The prefix as a slice, so that nothing is copied, and the list as indices."""
    parts: list[slice | Tensor] = [slice(0, prefix)] if prefix else []
    return parts if index is None or index.numel() == 0 else [*parts, index.long()]


def sparse_ffn(
    x: Tensor,
    gate: Weight,
    up: Weight | None,
    down: Weight,
    prefix: int,
    index: Tensor | None,
    activation: str,
    bias_gate: Tensor | None = None,
    bias_up: Tensor | None = None,
) -> Tensor:
    """Sum over the active neurons i of act(gate_i·x + b) (up_i·x + c) down_i; without `up`, of act(gate_i·x + b) down_i.

    x [..., H]; gate, up, down [L, H], neuron-major; active = the first `prefix` and those in `index`. Out like x.
    """
    dtype = _dtype_of(gate, x)
    inputs, result = x.to(dtype), torch.zeros_like(x, dtype=dtype)

    def product(weight: Weight, bias: Tensor | None, rows: slice | Tensor) -> Tensor:
        return F.linear(inputs, rows_of(weight, rows, dtype), None if bias is None else bias[rows].to(dtype))

    for rows in _active_parts(prefix, index):
        h = ACTIVATIONS[activation](product(gate, bias_gate, rows))
        if up is not None:
            h = h * product(up, bias_up, rows)
        result = result + h @ rows_of(down, rows, dtype)
    return result.to(x.dtype)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out]."""
    dtype = _dtype_of(weight, x)
    floats = rows_of(weight, slice(None), dtype)
    return F.linear(x.to(dtype), floats, None if bias is None else bias.to(dtype)).to(x.dtype)


def weighted_rows(h: Tensor, weight: Weight) -> Tensor:
    """h [..., n], weight [n, H] -> [..., H]."""
    dtype = _dtype_of(weight, h)
    return (h.to(dtype) @ rows_of(weight, slice(None), dtype)).to(h.dtype)


def sparse_ffn_by_up(
    x: Tensor,
    gate: Weight,
    up: Weight,
    down: Weight,
    prefix: int,
    index: Tensor | None,
    scale: Tensor,
    keep_count: int | None,
    threshold: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Per token, only the candidates with the largest |up_i·x| scale_i: out like x, and how many were computed [T]."""
    dtype = _dtype_of(gate, x)
    candidates = _candidates(prefix, index)
    out, computed = torch.empty_like(x), []
    for token, place in zip(x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1]), strict=True):
        u = rows_of(up, candidates, dtype) @ token.to(dtype)
        score = u.float().abs() * scale[candidates]
        kept = _largest(score, keep_count, threshold)
        rows = candidates[kept]
        h = ACTIVATIONS[activation](rows_of(gate, rows, dtype) @ token.to(dtype)) * u[kept]
        place.copy_(h @ rows_of(down, rows, dtype))
        computed.append(rows.numel())
    return out, torch.tensor(computed)


def sparse_ffn_plain_by_size(
    x: Tensor,
    fc1: Weight,
    bias1: Tensor | None,
    fc2: Weight,
    prefix: int,
    index: Tensor | None,
    scale: Tensor,
    keep_count: int | None,
    threshold: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Per token, fc2 only of the candidates with the largest |act(fc1_i·x + bias1_i)| scale_i; as sparse_ffn_by_up."""
    dtype = _dtype_of(fc1, x)
    candidates = _candidates(prefix, index)
    bias = None if bias1 is None else bias1[candidates].to(dtype)
    out, computed = torch.empty_like(x), []
    for token, place in zip(x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1]), strict=True):
        h = ACTIVATIONS[activation](F.linear(token.to(dtype), rows_of(fc1, candidates, dtype), bias))
        kept = _largest(h.float().abs() * scale[candidates], keep_count, threshold)
        place.copy_(h[kept] @ rows_of(fc2, candidates[kept], dtype))
        computed.append(kept.numel())
    return out, torch.tensor(computed)


def _candidates(prefix: int, index: Tensor | None) -> Tensor:
    """int64 [C]: the first `prefix` rows and those in `index`."""
    prefixed = torch.arange(prefix)
    return prefixed if index is None else torch.cat([prefixed, index.long()])


def _largest(scores: Tensor, count: int | None, threshold: float) -> Tensor:
    """Places of the `count` largest, or of those above the threshold; never of zeros."""
    kept = scores.topk(count).indices if count is not None else (scores > threshold).nonzero().squeeze(1)
    return kept[scores[kept] > 0]


def core_counts(h: Tensor, token_sparsity: float) -> Tensor:
    """See transformers_patches.kernels.core_counts."""
    tokens, loaded = h.shape
    counts = torch.zeros(loaded, dtype=torch.int64, device=h.device)
    if tokens == 0:
        return counts
    k = min(int(token_sparsity * int((h > 0).sum()) / tokens), loaded)
    values, marked = h.topk(k, dim=1, sorted=False)
    return counts.scatter_add_(0, marked.flatten(), (values > 0).flatten().long())


def most_marked(counts: Tensor, priority: Tensor, first: int, wanted: int) -> Tensor:
    """See transformers_patches.kernels.most_marked."""
    keys = counts * (int(priority.max()) + 1) - priority
    chosen = keys[first:].topk(wanted, sorted=False).indices + first
    return chosen.sort().values.int()


def sum_of_squares(values: Tensor) -> Tensor:
    """See transformers_patches.kernels.sum_of_squares."""
    return values.to(torch.float32, copy=True).square_().sum(0)


def typical_scale(sums: Tensor, tokens: int, prior: Tensor | None, prior_tokens: int, norms: Tensor) -> Tensor:
    """See transformers_patches.kernels.typical_scale."""
    known = sums.mean() / max(tokens, 1) if prior is None else prior.square()
    return known.mul(prior_tokens).add(sums).div_(tokens + prior_tokens).sqrt_().mul_(norms)
