"""int8 and int4 weights: quantising, and the kernels against the dequantised weights in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import blockwise, quantization

from .cases import QUANTIZED_FFN_SIZES
from .helpers import OF_BITS, active, double, error, exact_ffn, ffn, paired, quantized_ffn, unsorted_index, weights

# What int8 activations cost with random values, which are the hard case: 1 part in 127 of a group's largest.
ACTIVATION_ERROR = 2.5e-2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.012), (4, 0.11)])
def test_quantise_and_back(bits, largest):
    (weight,) = weights(1, 50, 192)
    packed = kernels.quantize(weight, OF_BITS[bits])
    assert packed.shape == weight.shape
    assert packed.nbytes == 50 * (192 * bits // 8 + 192 // 32 * 2)
    assert error(kernels.dequantize(packed), weight) < largest
    # Values that 4 or 8 bits can hold come back exactly.
    exact = torch.randint(-7, 7, (50, 192)).float()
    exact[:, ::32] = -8 if bits == 4 else 127
    assert torch.equal(kernels.dequantize(kernels.quantize(exact / 64, OF_BITS[bits])), exact / 64)


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_of_zeros(bits):
    weight = torch.zeros(3, 64)
    weight[1, 40] = 1.0
    assert error(kernels.dequantize(kernels.quantize(weight, OF_BITS[bits])), weight) < 1e-3


@pytest.mark.parametrize("hidden", [96, 160, 576, 1056])
def test_a_few_large_inputs_do_not_make_int8_coarse(variant, hidden):
    """As behind norms; the groups that they are in are taken in two terms. In one they cost 8 to 13 parts of 1,000."""
    x, (weight,) = torch.randn(9, hidden), weights(1, 40, hidden)
    for token in range(9):
        x[token, [(7 * token) % hidden, hidden - 1 - token]] *= 40
    packed = kernels.quantize(weight, kernels.INT8)
    exact = x.double() @ kernels.dequantize(packed).double().T
    assert error(kernels.linear(x, packed), exact) < 5e-3
    for one, expected in zip(x[:, None], exact, strict=True):
        assert error(kernels.linear(one, packed)[0], expected) < 5e-3


@pytest.mark.parametrize("hidden", [64, 96])
def test_two_terms_for_all_groups_are_nearly_exact(variant, hidden):
    x, (weight,) = torch.randn(3, hidden), weights(1, 17, hidden)
    packed = kernels.quantize(weight, kernels.INT8)
    assert error(kernels.linear(x, packed), x.double() @ kernels.dequantize(packed).double().T) < 1e-4
    assert not kernels.linear(torch.zeros(1, hidden), packed).any()


def test_the_search_for_scales_lowers_the_weighted_error():
    """Against scales that make each group's largest value exact."""
    (weight,) = weights(1, 64, 256)
    groups = weight.view(-1, 32)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    exact = ((groups / (largest / -8)).round().clamp(-8, 7) * (largest / -8)).view_as(weight)
    ours = kernels.dequantize(kernels.quantize(weight, kernels.INT4))
    cost = [((values - weight).square() * weight.abs()).sum() for values in (ours, exact)]
    assert cost[0] < 0.9 * cost[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_converting_is_the_same_everywhere(variant, bits, dtype):
    weight = weights(1, 21, 160)[0].to(dtype)
    weight[3, 32:64] = 0
    ours, expected = kernels.quantize(weight, OF_BITS[bits]), quantization.quantize(weight, OF_BITS[bits])
    assert torch.equal(ours.scales, expected.scales)
    assert torch.equal(ours.data, expected.data)
    out = torch.empty(21, 160, dtype=dtype)
    assert kernels.dequantize(expected, dtype, out) is out
    assert torch.equal(out, quantization.dequantize(expected, dtype))
    assert torch.equal(kernels.dequantize(expected[4:9], dtype), out[4:9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_column_weights_are_the_same_everywhere(variant, bits, dtype):
    weight, columns = weights(1, 200, 160)[0].to(dtype), torch.randn(160).mul(2).exp()
    ours, expected = (
        kernels.quantize(weight, OF_BITS[bits], columns),
        quantization.quantize(weight, OF_BITS[bits], columns),
    )
    assert torch.equal(ours.scales, expected.scales)
    assert torch.equal(ours.data, expected.data)
    assert not torch.equal(ours.scales, kernels.quantize(weight, OF_BITS[bits]).scales)


@pytest.mark.parametrize("bits", [8, 4])
def test_column_scales_keep_large_columns_from_small_ones(variant, bits):
    (weight,) = weights(1, 64, 96)
    weight[:, ::32] *= 100
    scales = quantization.column_scales(weight.abs().amax(dim=0))
    packed, plain = kernels.quantize(weight, OF_BITS[bits], None, scales), kernels.quantize(weight, OF_BITS[bits])
    assert packed.column_scales is scales
    assert packed.nbytes == plain.nbytes + 4 * 96
    restored = kernels.dequantize(packed)
    assert torch.equal(restored, quantization.dequantize(packed))
    small = torch.arange(96) % 32 > 0
    assert error(restored[:, small], weight[:, small]) < (0.01 if bits == 8 else 0.15)
    assert error(kernels.dequantize(plain)[:, small], weight[:, small]) > (0.1 if bits == 8 else 0.9)
    h = torch.randn(2, 9, 64)
    assert error(kernels.combine(h, packed), h @ restored) < 1e-5
    chosen = torch.tensor([5, 3, 60])
    for rows in (slice(7, 20), chosen):
        assert torch.equal(kernels.dequantize(packed[rows]), restored[rows])
    assert torch.equal(kernels.dequantize(packed.index_select(0, chosen)), restored[chosen])
    copy = packed.like(torch.empty_like)
    copy.copy_(packed)
    assert torch.equal(kernels.dequantize(copy), restored)
    assert torch.equal(quantization.column_scales(torch.tensor([0.0, 64.0])), torch.ones(2))


def test_interleaved_rows_are_unpacked(variant):
    for bits in (8, 4):
        first, second = (kernels.quantize(weight, OF_BITS[bits]) for weight in weights(2, 37, 96))
        for apart, together in zip((first, second), paired(first, second), strict=True):
            assert torch.equal(kernels.dequantize(together), kernels.dequantize(apart))


@pytest.mark.parametrize("bits, lower", [(8, 0.75), (4, 0.75)])
def test_column_weights_lower_the_error_where_it_counts(bits, lower):
    (weight,) = weights(1, 64, 256)
    columns = torch.ones(256)
    columns[::16] = 1000
    errors = {}
    for name, counts in (("plain", None), ("even", torch.ones(256)), ("weighted", columns)):
        restored = kernels.dequantize(kernels.quantize(weight, OF_BITS[bits], counts))
        errors[name] = float(((restored - weight).square() * columns).sum())
    assert errors["weighted"] < lower * errors["plain"]
    if bits == 4:  # without weights the same search; 8 bits then have exact scales
        assert errors["even"] == errors["plain"]


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_quantised_already_stays_as_it_is(variant, bits):
    """With weights of columns, too: GGUF files of the same format lose nothing."""
    first = kernels.quantize(weights(1, 64, 256)[0], OF_BITS[bits])
    again = kernels.quantize(kernels.dequantize(first), OF_BITS[bits], torch.randn(256).exp())
    assert torch.equal(kernels.dequantize(again), kernels.dequantize(first))


def test_other_column_weights_are_refused():
    for wrong in (torch.ones(32), torch.ones(64, dtype=torch.float64), torch.ones(1, 64)):
        with pytest.raises(PartInferError, match="column weights must be float32"):
            kernels.quantize(torch.randn(4, 64), kernels.INT4, wrong)


@pytest.mark.parametrize("bits", [8, 4])
def test_products_of_many_tokens(variant, bits, monkeypatch):
    """In blocks, the last of them smaller, exactly the products with the dequantised weights."""
    monkeypatch.setattr(blockwise, "BLOCK_VALUES", 7 * 64)
    packed, x, bias = kernels.quantize(weights(1, 45, 64)[0], OF_BITS[bits]), torch.randn(2, 9, 64), torch.randn(45)
    floats = kernels.dequantize(packed)
    assert error(kernels.project(x, packed, bias), torch.nn.functional.linear(x, floats, bias)) < 1e-5
    h = torch.randn(2, 9, 45)
    assert error(kernels.combine(h, packed), h @ floats) < 1e-5


@pytest.mark.parametrize("weight_format", [kernels.INT8, kernels.INT4])
def test_what_cannot_be_quantised(weight_format):
    with pytest.raises(PartInferError, match="multiple of 32"):
        kernels.quantize(torch.randn(4, 48), weight_format)
    with pytest.raises(PartInferError, match="must be one of int8, int4, got 'int5'"):
        kernels.format_named("int5")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", QUANTIZED_FFN_SIZES, ids=str)
def test_gated_ffn(variant, bits, size):
    tokens, columns, rows, prefix, listed = size
    x, index = torch.randn(tokens, columns), unsorted_index(prefix, rows, listed)
    floats = weights(3, rows, columns)
    for packed in ([kernels.quantize(weight, OF_BITS[bits]) for weight in floats], quantized_ffn(floats, bits)):
        for activation in ("silu", "relu"):
            result = ffn(x, packed, prefix, index, activation)
            expected = exact_ffn(x, packed, prefix, index, activation)
            assert error(result, expected) < ACTIVATION_ERROR, activation


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", QUANTIZED_FFN_SIZES, ids=str)
def test_plain_and_linear(variant, bits, size):
    tokens, columns, rows, prefix, listed = size
    x, index, bias = torch.randn(tokens, columns), unsorted_index(prefix, rows, listed), torch.randn(rows)
    packed = quantized_ffn(weights(2, rows, columns), bits)
    result = ffn(x, packed, prefix, index, biases=[bias, None])
    expected = exact_ffn(x, packed, prefix, index, biases=[bias, None])
    assert error(result, expected) < ACTIVATION_ERROR
    expected = torch.nn.functional.linear(*double(x, kernels.dequantize(packed[0]), bias))
    assert error(kernels.linear(x, packed[0], bias), expected) < ACTIVATION_ERROR


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_exact(variant, bits):
    """Where activations and weights are small integers with one scale nothing is rounded."""
    x = torch.randint(-127, 128, (1, 96)).float()
    x[:, ::32] = 127
    weight = torch.randint(-7, 7, (40, 96)).float()
    weight[:, ::32] = -8 if bits == 4 else 127
    assert error(kernels.linear(x, kernels.quantize(weight, OF_BITS[bits])), x @ weight.t()) < 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_variants_agree(native, bits):
    """All variants do the same arithmetic on the same rounded activations."""
    x, index = torch.randn(2, 608), unsorted_index(50, 200, 60)
    packed = [kernels.quantize(weight, OF_BITS[bits]) for weight in weights(3, 200, 608)]
    results = {}
    for name in kernels.variants():
        with kernels.use_variant(name):
            results[name] = ffn(x, packed, 50, index)
    assert all(error(result, results["scalar"]) < 2e-3 for result in results.values())


def test_bad_arguments(native):
    packed = [kernels.quantize(weight, kernels.INT8) for weight in weights(3, 40, 64)]
    with pytest.raises(ValueError, match=r"gate must be \[40, 32\]"):
        ffn(torch.randn(1, 32), packed, 40)
    with pytest.raises(ValueError, match="groups of 32 columns"):
        ffn(torch.randn(1, 33), packed, 40)
    scaled = replace(packed[2], column_scales=torch.ones(32))
    with pytest.raises(ValueError, match=r"column scales must be contiguous float32 \[64\], got Float \[32\]"):
        ffn(torch.randn(1, 64), [*packed[:2], scaled], 40)
    mixed = replace(active(packed, 40).projections, format=kernels.INT4)
    with pytest.raises(ValueError, match="gate must be uint8"):
        kernels.ffn(torch.randn(1, 64), kernels.ActiveNeurons(mixed, "silu", 40))
