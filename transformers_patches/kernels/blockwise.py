"""Matrix products with weights in any format, for many tokens and on any device.

Quantised weights are converted to floats block by block, so that only one block at a time takes extra memory. So are
16-bit weights where the processor has no instructions for their products (x86 without AVX-512: bfloat16 at a seventh of
float32's speed; with AVX-512, but not for bfloat16: at a fifth).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from transformers_patches.kernels.quantization import QuantizedTensor

BLOCK_VALUES = 2**21  # weights of a block: as floats a few megabytes, which fit into caches

# converts quantised rows to floats: (weight, dtype, out)
Dequantize = Callable[[QuantizedTensor, torch.dtype, Tensor], Tensor]


@cache
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether PyTorch's matrix products of this type have a fast path on this processor."""
    asked = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype not in asked or not torch.backends.mkldnn.is_available():
        return True
    return asked[dtype]() and (dtype != torch.bfloat16 or _has_bfloat16_products(torch.cpu.get_capabilities()))


# of x86; what has none of them, oneDNN calls supported with plain AVX-512, and converts
_BFLOAT16_PRODUCTS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "avx10_2")


def _has_bfloat16_products(capabilities: dict[str, object]) -> bool:
    """capabilities: of the processor, as PyTorch names them."""
    is_x86 = capabilities.get("architecture") in ("x86_64", "AMD64")
    return not is_x86 or any(capabilities.get(name) for name in _BFLOAT16_PRODUCTS)


def _product_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.device.type != "cpu" or multiplies_fast(x.dtype) else torch.float32


_kept = threading.local()


def _room(values: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a block.

    On the CPU every thread reuses its own: newly allocated pages cost page faults, and the C library does not return
    all of them to the system.
    """
    if device.type != "cpu":
        return torch.empty(values, dtype=dtype, device=device)
    nbytes = values * dtype.itemsize
    if len(getattr(_kept, "memory", ())) < nbytes:
        with torch.inference_mode(False):  # for use inside and outside inference mode
            _kept.memory = torch.empty(nbytes, dtype=torch.uint8)
    return _kept.memory[:nbytes].view(dtype)


def _blocks(
    weight: Tensor | QuantizedTensor, dtype: torch.dtype, dequantize: Dequantize
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those rows as floats), in order. The thread's next block overwrites the floats."""
    step = min(len(weight), max(1, BLOCK_VALUES // weight.shape[1]))
    block = _room(step * weight.shape[1], dtype, weight.device).view(step, weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, min(start + step, len(weight)))
        part = block[: rows.stop - start]
        quantized = isinstance(weight, QuantizedTensor)
        yield rows, dequantize(weight[rows], dtype, part) if quantized else part.copy_(weight[rows])


def project(x: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, dequantize: Dequantize) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out], as F.linear."""
    dtype = _product_type(x)
    if not isinstance(weight, QuantizedTensor) and dtype == x.dtype:
        return F.linear(x, weight, bias)
    out, wide = x.new_empty(*x.shape[:-1], len(weight)), x.to(dtype)
    for rows, floats in _blocks(weight, dtype, dequantize):
        out[..., rows] = F.linear(wide, floats, None if bias is None else bias[rows].to(dtype))
    return out


def combine(h: Tensor, weight: Tensor | QuantizedTensor, dequantize: Dequantize) -> Tensor:
    """h [..., n], weight [n, H] -> [..., H], the weighted sums of the rows."""
    dtype, columns = _product_type(h), None
    if isinstance(weight, QuantizedTensor):
        weight, columns = replace(weight, column_scales=None), weight.column_scales
    elif dtype == h.dtype:
        return h @ weight
    out, wide = torch.zeros(*h.shape[:-1], weight.shape[1], dtype=torch.float32, device=h.device), h.to(dtype)
    for rows, floats in _blocks(weight, dtype, dequantize):
        out += wide[..., rows] @ floats
    if columns is not None:  # once, before the result is rounded
        out *= columns
    return out.to(h.dtype)
