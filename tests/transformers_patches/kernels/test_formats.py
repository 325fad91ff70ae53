"""Weight formats: those that there are, and one that is made up, which PyTorch alone can read."""

from __future__ import annotations

import pytest
import torch

from tests.transformers_patches.made_up_format import MADE_UP
from transformers_patches import config, kernels
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import QuantizedTensor, formats

from .helpers import error, ffn, weights


def test_the_settings_know_all_formats():
    assert tuple(formats.FORMATS) == config.QUANTIZED_DTYPES
    assert all(known.name == name for name, known in formats.FORMATS.items())
    assert config.HEAD_DTYPE in formats.FORMATS


def test_an_unknown_name_is_told():
    with pytest.raises(PartInferError, match="must be one of int8, int4, got 'made_up'"):
        kernels.format_named("made_up")


@pytest.mark.parametrize("weight_format", [kernels.INT8, kernels.INT4, MADE_UP], ids=lambda known: known.name)
def test_rows_have_the_bytes_that_the_format_says(weight_format):
    (weight,) = weights(1, 7, 96)
    packed = kernels.quantize(weight, weight_format)
    assert packed.shape == weight.shape
    assert packed.nbytes == 7 * weight_format.row_bytes(96)
    expected = {"int8": 96 + 3 * 2, "int4": 48 + 3 * 2, "made_up": 96 + 6 * 2 * 4}
    assert weight_format.row_bytes(96) == expected[weight_format.name]


def test_only_8_bits_lie_in_planes():
    for weight_format in (kernels.INT4, MADE_UP):
        with pytest.raises(ValueError, match=f"{weight_format.name} weights can't be in planes"):
            QuantizedTensor.empty(2, 32, weight_format, in_planes=True)


def test_every_operation_takes_a_format_that_no_native_kernel_knows():
    """Also where the library is there, which must not take the bytes for another format's."""
    torch.manual_seed(0)
    gate, up, down = (kernels.quantize(weight, MADE_UP) for weight in weights(3, 40, 48))
    floats = [kernels.dequantize(weight) for weight in (gate, up, down)]
    assert error(floats[0], weights_again := kernels.dequantize(gate[:40])) == 0
    assert torch.equal(weights_again[5:9], kernels.dequantize(gate[5:9]))
    x, h, index = torch.randn(1, 48), torch.randn(1, 40), torch.tensor([20, 33], dtype=torch.int32)
    size = torch.rand(40)
    for ours, theirs in (
        (kernels.linear(x, gate), kernels.linear(x, floats[0])),
        (kernels.project(x, gate), x @ floats[0].T),
        (kernels.weighted_rows(h, down), h @ floats[2]),
        (kernels.combine(h, down), h @ floats[2]),
        (
            ffn(x, [gate, up, down], 10, index),
            ffn(x, floats, 10, index),
        ),
        (
            ffn(x, [gate, up, down], 40, size=size, keep_count=7),
            ffn(x, floats, 40, size=size, keep_count=7),
        ),
        (
            ffn(x, [gate, down], 10, index),
            ffn(x, [floats[0], floats[2]], 10, index),
        ),
    ):
        assert error(ours, theirs) < 1e-5


def test_column_scales_and_weights_are_not_the_formats_own_matter():
    (weight,) = weights(1, 24, 64)
    scales = torch.logspace(-2, 2, 64)[torch.randperm(64)]
    packed = kernels.quantize(weight * scales, MADE_UP, None, scales)
    assert error(kernels.dequantize(packed) / scales, weight) < 0.1
    assert error(kernels.dequantize(kernels.quantize(weight * scales, MADE_UP)) / scales, weight) > 0.5
    with pytest.raises(PartInferError, match="multiple of 16"):
        kernels.quantize(torch.randn(2, 24), MADE_UP)
