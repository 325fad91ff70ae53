"""Matrix products with weights of any kind, for many tokens and on any device.

Quantised weights are turned into floats block by block, so that never more than a block is there twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from transformers_patches.kernels.quantization import QuantizedTensor

BLOCK_VALUES = 2**21  # weights of a block: a few megabytes as floats, which caches hold

# what turns quantised rows into floats: (weight, dtype, out)
Dequantize = Callable[[QuantizedTensor, torch.dtype, Tensor], Tensor]


def _blocks(weight: QuantizedTensor, dtype: torch.dtype, dequantize: Dequantize) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those rows as floats), in order; the floats are gone with the next block."""
    step = min(len(weight), max(1, BLOCK_VALUES // weight.shape[1]))
    block = torch.empty(step, weight.shape[1], dtype=dtype, device=weight.device)
    for start in range(0, len(weight), step):
        rows = slice(start, min(start + step, len(weight)))
        yield rows, dequantize(weight[rows], dtype, block[: rows.stop - start])


def project(x: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, dequantize: Dequantize) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out], as F.linear."""
    if not isinstance(weight, QuantizedTensor):
        return F.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], len(weight))
    for rows, floats in _blocks(weight, x.dtype, dequantize):
        out[..., rows] = F.linear(x, floats, None if bias is None else bias[rows])
    return out


def combine(h: Tensor, weight: Tensor | QuantizedTensor, dequantize: Dequantize) -> Tensor:
    """h [..., n], weight [n, H] -> [..., H], the weighted sums of the rows."""
    if not isinstance(weight, QuantizedTensor):
        return h @ weight
    out = torch.zeros(*h.shape[:-1], weight.shape[1], dtype=torch.float32, device=h.device)
    for rows, floats in _blocks(replace(weight, column_scales=None), h.dtype, dequantize):
        out += h[..., rows] @ floats
    if weight.column_scales is not None:  # once, and before anything is rounded
        out *= weight.column_scales
    return out.to(h.dtype)
