"""Layers stored by input, of which a token reads the inputs that matter: against float64 in PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transformers_patches import kernels
from transformers_patches.kernels import ByInput, Weight

from .cases import BY_INPUT_SIZES
from .helpers import OF_BITS, TOLERANCE, error, weights

QUANTIZED_ERROR = 1e-2  # factors are rounded to 8 bits


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer_of(weight: Weight, inputs: int, outputs: int, read: float) -> tuple[Tensor, ByInput]:
    """A token, and the layer with a threshold that leaves it a share of its inputs."""
    x, mean, norm = torch.randn(1, inputs), torch.randn(inputs) / 2, torch.rand(inputs) + 0.5
    scores = ((x[0] - mean).abs() * norm).sort(descending=True).values
    last = round(read * inputs)
    threshold = -1.0 if read == 1 else float(scores[last - 1 : last + 1].mean()) if last else 2 * float(scores[0])
    return x, ByInput(weight, mean, norm, torch.randn(outputs), threshold)


def expected(x: Tensor, layer: ByInput, floats: Tensor) -> tuple[Tensor, int]:
    apart = x[0].double() - layer.mean.double()
    kept = (apart.abs() * layer.norm > layer.threshold) if layer.threshold >= 0 else torch.ones(len(apart), dtype=bool)
    return layer.constant.double() + (apart * kept) @ floats.double(), int(kept.sum())


@pytest.mark.parametrize("read", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", BY_INPUT_SIZES, ids=str)
def test_floats(variant, dtype, size, read):
    inputs, outputs, _ = size
    (weight,) = weights(1, inputs, outputs, dtype)
    x, layer = layer_of(weight, inputs, outputs, read)
    result, count = kernels.by_input(x, layer)
    wanted, wanted_count = expected(x, layer, weight)
    assert error(result[0], wanted) < TOLERANCE[dtype]
    assert count.tolist() == [wanted_count]


@pytest.mark.parametrize("threads_used", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", BY_INPUT_SIZES, ids=str)
def test_quantised(variant, threads, bits, size, threads_used):
    inputs, _, outputs = size
    threads(threads_used)
    weight = kernels.quantize(weights(1, inputs, outputs)[0] * torch.rand(inputs, 1), OF_BITS[bits])
    x, layer = layer_of(weight, inputs, outputs, 0.7)
    result, count = kernels.by_input(x, layer)
    wanted, wanted_count = expected(x, layer, kernels.dequantize(weight))
    assert error(result[0] - layer.constant, wanted - layer.constant) < QUANTIZED_ERROR
    assert count.tolist() == [wanted_count]


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_exact(variant, bits):
    """Where x and weights are small integers, and the largest of 8 rows is 127 times their one scale."""
    x = torch.randint(-127, 128, (1, 48)).float()
    x[:, ::8] = 127
    weight = torch.randint(-7, 7, (48, 4704)).float()
    weight[:, ::32] = -8 if bits == 4 else 127
    none = torch.zeros(48)
    layer = ByInput(kernels.quantize(weight, OF_BITS[bits]), none, none + 1, torch.zeros(4704), -1.0)
    assert error(kernels.by_input(x, layer)[0], x @ weight) < 1e-6
