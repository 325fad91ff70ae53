"""Products and sums of rows by Triton, over the cases of the native kernels: against float64 in PyTorch."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import reference
from transformers_patches.kernels.triton import operations

from ..cases import FFN_SIZES, QUANTIZED_FFN_SIZES, SUM_SIZES
from ..helpers import OF_BITS, TOLERANCE, active, error, exact_ffn, paired, quantized_ffn, unsorted_index, weights
from .moved import moved

# those with few tokens: the interpreter is slow
SIZES, QUANTIZED_SIZES, SUMS = FFN_SIZES[:4], QUANTIZED_FFN_SIZES[:4], SUM_SIZES[:4]
EXACT = 1e-5  # quantised weights are multiplied with tokens that are not rounded


def run(device, name: str, *arguments):
    """An operation on the device; its first result on the CPU."""
    result = getattr(operations, name)(*moved(list(arguments), device))
    return (result[0] if isinstance(result, tuple) else result).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gated_ffn(device, large_blocks, dtype, size):
    tokens, columns, rows, prefix, listed = size
    x, parts = torch.randn(tokens, columns).to(dtype), weights(3, rows, columns, dtype)
    index = unsorted_index(prefix, rows, listed)
    result = run(device, "ffn", x, active(parts, prefix, index))
    assert result.dtype == dtype
    assert error(result, exact_ffn(x, parts, prefix, index)) < TOLERANCE[dtype]


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_plain_ffn(device, large_blocks, size):
    tokens, columns, rows, prefix, listed = size
    x, parts, bias = torch.randn(tokens, columns), weights(2, rows, columns), torch.randn(rows)
    index = unsorted_index(prefix, rows, listed)
    result = run(device, "ffn", x, active(parts, prefix, index, "gelu", [bias, None]))
    assert error(result, exact_ffn(x, parts, prefix, index, "gelu", biases=[bias, None])) < EXACT


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(device, activation):
    x, parts = 4 * torch.randn(2, 32), weights(3, 17, 32)
    biases = [torch.randn(17), torch.randn(17), None]
    result = run(device, "ffn", x, active(parts, 17, None, activation, biases))
    assert error(result, exact_ffn(x, parts, 17, None, activation, biases=biases)) < EXACT
    far = run(device, "linear", torch.full((1, 32), 1e4), parts[0])
    assert torch.isfinite(far).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", QUANTIZED_SIZES, ids=str)
def test_quantised_ffn(device, large_blocks, bits, size):
    tokens, columns, rows, prefix, listed = size
    x, parts = torch.randn(tokens, columns), quantized_ffn(weights(3, rows, columns), bits)
    index = unsorted_index(prefix, rows, listed)
    assert error(run(device, "ffn", x, active(parts, prefix, index)), exact_ffn(x, parts, prefix, index)) < EXACT


@pytest.mark.parametrize("kind", [torch.bfloat16, 8, 4], ids=str)
def test_blocks_as_gpus_have_them(device, kind):
    """More slots, columns and parts of a sum than one program takes, and rows that are interleaved with others."""
    x, floats, index = torch.randn(1, 160), weights(3, 39, 160), unsorted_index(9, 39, 24)
    gate, up, down = quantized_ffn(floats, kind) if isinstance(kind, int) else [part.to(kind) for part in floats]
    expected = exact_ffn(x, [gate, up, down], 9, index)
    result = run(device, "ffn", x, active([gate, up, down], 9, index))
    assert error(result, expected) < EXACT
    gate, down = paired(gate, down)
    assert torch.equal(run(device, "ffn", x, active([gate, up, down], 9, index)), result)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, 8, 4], ids=str)
def test_linear(device, large_blocks, kind):
    x, (weight,), bias = torch.randn(2, 3, 160), weights(1, 41, 160), torch.randn(41)
    packed = kernels.quantize(weight, OF_BITS[kind]) if isinstance(kind, int) else weight.to(kind)
    floats = kernels.dequantize(packed) if isinstance(kind, int) else packed
    expected = torch.nn.functional.linear(x.double(), floats.double(), bias.double())
    assert error(run(device, "linear", x, packed, bias), expected) < EXACT
    assert error(run(device, "linear", x, packed), expected - bias) < EXACT


@pytest.mark.parametrize("size", SUMS, ids=str)
def test_weighted_rows(device, large_blocks, size):
    tokens, rows, columns, packed_columns = size
    h, (weight,) = torch.randn(tokens, rows).bfloat16(), weights(1, rows, columns, torch.bfloat16)
    assert error(run(device, "weighted_rows", h, weight), h.double() @ weight.double()) < TOLERANCE[torch.bfloat16]
    (packed,) = quantized_ffn(weights(1, rows, packed_columns), 4)
    floats = kernels.dequantize(packed)
    assert error(run(device, "weighted_rows", h.float(), packed), h.double() @ floats.double()) < EXACT


@pytest.mark.parametrize(("prefix", "listed"), [(0, 1), (1, 0), (0, 0)])
def test_one_and_no_neurons(device, prefix, listed):
    x, parts = torch.randn(1, 64), weights(3, 40, 64)
    index = unsorted_index(prefix, 40, listed)
    result = run(device, "ffn", x, active(parts, prefix, index))
    assert error(result, exact_ffn(x, parts, prefix, index)) < EXACT


def test_vectors_are_added_and_shapes_kept(device):
    x, parts, added = torch.randn(1, 2, 32), weights(3, 9, 32), torch.randn(2, 32)
    plain = run(device, "ffn", x, active(parts, 9))
    result = run(device, "ffn", x, active(parts, 9, added=list(added)))
    assert torch.equal(result, plain + added[0] + added[1])
    assert result.shape == x.shape


def test_rows_with_a_factor_of_zero_are_not_read(device):
    h, weight = torch.randn(1, 30), torch.randn(30, 64)
    h[:, ::3] = 0
    expected = h @ weight
    weight[::3] = torch.nan
    assert error(run(device, "weighted_rows", h, weight), expected) < EXACT
