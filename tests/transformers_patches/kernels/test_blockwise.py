"""Products of many tokens with weights of 16 bits, on processors with and without fast ones."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import blockwise, operations
from transformers_patches.modules.fast_linear import FastLinear

from .helpers import OF_BITS, TOLERANCE, double, error, weights

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request, monkeypatch):
    monkeypatch.setattr(blockwise, "multiplies_fast", lambda dtype: request.param or dtype not in HALVES)
    monkeypatch.setattr(blockwise, "BLOCK_VALUES", 7 * 64)  # several blocks, the last of them smaller
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_products_are_right_in_their_own_type(fast, dtype):
    torch.manual_seed(0)
    weight, x, bias, h = (v.to(dtype) for v in (*weights(1, 45, 64), *(torch.randn(2, 9, n) for n in (64, 1, 45))))
    bias = bias.flatten()[:1].expand(45).contiguous()
    linear = torch.nn.Linear(64, 45, dtype=dtype)
    linear.weight.data, linear.bias.data = weight, bias
    expected = torch.nn.functional.linear(*double(x, weight, bias))
    for result in (kernels.project(x, weight, bias), FastLinear.of(linear)(x)):
        assert result.dtype == dtype
        assert error(result, expected) < TOLERANCE[dtype]
    assert error(kernels.project(x, weight), x.double() @ weight.double().T) < TOLERANCE[dtype]
    result = kernels.combine(h, weight)
    assert result.dtype == dtype
    assert error(result, h.double() @ weight.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_quantised_weights_become_floats_of_the_type_that_is_fast(fast, bits, dtype, monkeypatch):
    seen = set()
    dequantize = kernels.dequantize
    monkeypatch.setattr(operations, "dequantize", lambda *a: seen.add(a[1]) or dequantize(*a))
    packed, x = kernels.quantize(weights(1, 45, 64)[0], OF_BITS[bits]), torch.randn(9, 64).to(dtype)
    exact = dequantize(packed).double()
    assert error(kernels.project(x, packed), x.double() @ exact.T) < TOLERANCE[dtype]
    h = torch.randn(9, 45).to(dtype)
    assert error(kernels.combine(h, packed), h.double() @ exact) < TOLERANCE[dtype]
    assert seen == {dtype if fast else torch.float32}


@pytest.mark.parametrize(
    ("has", "architecture", "fast"),
    [
        ((), "x86_64", False),
        (("avx2", "avx512_f", "avx512_vnni"), "x86_64", False),  # where oneDNN calls bfloat16 supported
        (("avx512_f", "avx512_bf16"), "x86_64", True),
        (("amx_bf16",), "x86_64", True),
        (("avx_ne_convert",), "x86_64", True),
        (("neon",), "aarch64", True),  # there oneDNN's own answer counts
    ],
)
def test_x86_needs_instructions_for_bfloat16(has, architecture, fast):
    assert blockwise._has_bfloat16_products({"architecture": architecture, **dict.fromkeys(has, True)}) == fast
