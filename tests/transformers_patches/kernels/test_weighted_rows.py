"""Weighted sums of rows, for few tokens: float and quantised weights, against float64 in PyTorch."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels

from .cases import SUM_SIZES
from .helpers import OF_BITS, TOLERANCE, error, paired, quantized_ffn, weights

QUANTIZED_ERROR = 1e-2  # h is rounded to 8 bits


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SUM_SIZES, ids=str)
def test_floats(variant, dtype, size):
    tokens, rows, columns, _ = size
    h, (weight,) = torch.randn(tokens, rows).to(dtype), weights(1, rows, columns, dtype)
    result = kernels.weighted_rows(h, weight)
    assert result.dtype == dtype
    assert error(result, h.double() @ weight.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", SUM_SIZES, ids=str)
def test_quantised(variant, bits, size):
    tokens, rows, _, columns = size
    h, floats = torch.randn(tokens, rows), weights(1, rows, columns)
    for packed in (kernels.quantize(floats[0], OF_BITS[bits]), *quantized_ffn(floats, bits)):
        assert (
            error(kernels.weighted_rows(h, packed), h.double() @ kernels.dequantize(packed).double()) < QUANTIZED_ERROR
        )


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_exact(variant, bits):
    """Where h and weights are small integers, and the largest of 8 rows is 127 times their one scale."""
    h = torch.randint(-127, 128, (3, 40)).float()
    h[:, ::8] = 127
    weight = torch.randint(-7, 7, (40, 96)).float()
    weight[:, ::32] = -8 if bits == 4 else 127
    assert error(kernels.weighted_rows(h, kernels.quantize(weight, OF_BITS[bits])), h @ weight) < 1e-6


def test_float32_h_for_bfloat16_rows(variant):
    h, (weight,) = torch.randn(2, 50), weights(1, 50, 96, torch.bfloat16)
    result = kernels.weighted_rows(h, weight)
    assert result.dtype == torch.float32
    assert error(result, h.double() @ weight.double()) < 1e-2


def test_interleaved_rows(variant):
    h, pair = torch.randn(3, 37), weights(2, 37, 96)
    for rows in (pair, [kernels.quantize(weight, kernels.INT8) for weight in pair]):
        for apart, together in zip(rows, paired(*rows), strict=True):
            assert torch.equal(kernels.weighted_rows(h, together), kernels.weighted_rows(h, apart))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_threads_change_nothing_but_rounding(variant, threads, count):
    h, (weight,) = torch.randn(11, 1001), weights(1, 1001, 512)
    threads(count)
    result = kernels.weighted_rows(h, weight)
    assert error(result, h.double() @ weight.double()) < 1e-5
    assert all(torch.equal(kernels.weighted_rows(h, weight), result) for _ in range(5))


@pytest.mark.parametrize(
    "weight_of", [lambda w: w, lambda w: kernels.quantize(w, kernels.INT8)], ids=["float32", "int8"]
)
def test_tokens_do_not_see_each_other(native, weight_of):
    h, weight = torch.randn(19, 53), weight_of(weights(1, 53, 96)[0])
    together = kernels.weighted_rows(h, weight)
    for token, expected in zip(h, together, strict=True):
        assert error(kernels.weighted_rows(token, weight), expected) < 1e-6


def test_shapes(variant):
    (weight,) = weights(1, 40, 48)
    assert kernels.weighted_rows(torch.randn(2, 1, 40), weight).shape == (2, 1, 48)
    assert kernels.weighted_rows(torch.randn(0, 40), weight).shape == (0, 48)
    assert torch.equal(kernels.weighted_rows(torch.randn(2, 0), weight[:0]), torch.zeros(2, 48))
    transposed = torch.randn(40, 3).t()
    assert error(kernels.weighted_rows(transposed, weight), transposed.double() @ weight.double()) < 1e-5


def test_bad_arguments(native):
    (weight,) = weights(1, 40, 64)
    packed = kernels.quantize(weight, kernels.INT8)
    for rows in (weight, packed):
        with pytest.raises(ValueError, match=r"h must be \[\.\.\., 40\] like the weight's rows, got \[1, 39\]"):
            kernels.weighted_rows(torch.randn(1, 39), rows)
    with pytest.raises(ValueError, match="weight must have contiguous rows"):
        kernels.weighted_rows(torch.randn(1, 64), weight.t())
    with pytest.raises(ValueError, match="h must be float32, bfloat16 or float16, got Double"):
        kernels.weighted_rows(torch.randn(1, 40).double(), weight)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_ops_are_well_registered(native, bits):
    h, (weight,) = torch.randn(2, 3, 40), weights(1, 40, 64)
    name, arguments = "weighted_rows", (h, weight)
    if bits is not None:
        (packed,) = quantized_ffn([weight], bits)
        name, arguments = "quant_weighted_rows", (h, packed.data, packed.scales, packed.column_scales, bits)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.partinfer, name).default, arguments, test_utils=checks)


def test_compiles_with_torch(native):
    h, (weight,) = torch.randn(2, 40), weights(1, 40, 64)
    compiled = torch.compile(lambda h: kernels.weighted_rows(h, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(h), kernels.weighted_rows(h, weight))
