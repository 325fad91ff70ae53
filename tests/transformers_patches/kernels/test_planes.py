"""8-bit weights in two planes of 4 bits are the same weights."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import quantization

SHAPES = [(1, 32), (5, 64), (700, 96), (40, 1088)]


def quantized(rows: int, columns: int, seed: int = 0) -> kernels.QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    return kernels.quantize(torch.randn(rows, columns, generator=generator), kernels.INT8)


@pytest.mark.parametrize("shape", SHAPES)
def test_planes_hold_the_same_weight(variant, shape):
    weight = quantized(*shape)
    weight.data[0, :2] = torch.tensor([-128, 127], dtype=torch.int8)
    packed = kernels.split_planes(weight)
    assert packed.in_planes
    assert (packed.shape, packed.nbytes, len(packed)) == (weight.shape, weight.nbytes, len(weight))
    assert torch.equal(packed.data, quantization.split_planes(weight).data)
    assert torch.equal(kernels.join_planes(packed).data, weight.data)
    assert torch.equal(quantization.join_planes(packed).data, weight.data)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(kernels.dequantize(packed, dtype), kernels.dequantize(weight, dtype))
    some = torch.tensor([0, shape[0] // 2, 0])
    for part in (packed[some], packed.index_select(0, some)):
        assert torch.equal(kernels.join_planes(part).data, weight.data[some])
    assert torch.equal(kernels.join_planes(packed[shape[0] // 3 :]).data, weight.data[shape[0] // 3 :])


def test_rows_can_be_put_one_after_the_other():
    weight = quantized(9, 64)
    packed = kernels.QuantizedTensor.empty(9, 64, kernels.INT8, in_planes=True)
    packed.put(slice(3, 9), kernels.split_planes(weight[3:]))
    packed.put(torch.tensor([2, 0, 1]), kernels.split_planes(weight[torch.tensor([2, 0, 1])]))
    assert torch.equal(kernels.join_planes(packed).data, weight.data)
    assert torch.equal(packed.scales, weight.scales)


def test_other_products_unpack_planes(variant):
    weight, x = quantized(700, 96), torch.randn(1, 96)
    packed = kernels.split_planes(weight)
    expected = kernels.project(x, weight)
    assert torch.equal(kernels.project(x, packed), expected)
    assert torch.equal(kernels.linear(x, packed), expected)
