"""Neurons and inputs that tokens choose, by Triton: against the reference in PyTorch."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import ByInput, reference
from transformers_patches.kernels.triton import launch, operations

from ..cases import BY_INPUT_SIZES
from ..helpers import OF_BITS, TOLERANCE, active, error, quantized_ffn, unsorted_index, weights
from .moved import moved


def both(device, name: str, *arguments):
    """An operation's result on the device and the reference's, each with its counts as a list."""
    ours, ours_counts = getattr(operations, name)(*moved(list(arguments), device))
    theirs, their_counts = getattr(reference, name)(*arguments)
    return (ours.cpu(), ours_counts.tolist()), (theirs, their_counts.tolist())


@pytest.mark.parametrize("keep", [0, 1, 40, 80])
def test_keeps_exactly_so_many(device, large_blocks, keep):
    x, parts = torch.randn(2, 96), weights(3, 101, 96)
    layer = active(parts, 60, unsorted_index(60, 101, 20), size=torch.rand(101), keep_count=keep)
    (ours, counts), (theirs, expected) = both(device, "ffn", x, layer)
    assert counts == expected == [keep, keep]
    assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.4])
def test_threshold(device, large_blocks, threshold):
    x, parts = torch.randn(2, 96), weights(3, 201, 96)
    layer = active(parts, 200, size=torch.rand(201), threshold=threshold)
    (ours, counts), (theirs, expected) = both(device, "ffn", x, layer)
    assert counts == expected
    assert threshold <= 0 or 0 < counts[0] < 200
    assert error(ours, theirs) < 1e-5


def test_the_device_s_threshold_takes_the_place_of_the_number(device, large_blocks):
    x, parts, size = torch.randn(1, 96), weights(3, 101, 96), torch.rand(101)
    expected, _ = reference.ffn(x, active(parts, 90, size=size, threshold=0.5))
    layer = moved(active(parts, 90, size=size, threshold=0.1), device)
    ours, _ = operations.ffn_on_device(x.to(device), layer, torch.tensor([0.5], device=device))
    assert error(ours.cpu(), expected) < 1e-5


@pytest.mark.parametrize("kind", [torch.bfloat16, 8, 4], ids=str)
def test_other_weights(device, large_blocks, kind):
    x, floats = torch.randn(1, 160), weights(3, 150, 160)
    parts = quantized_ffn(floats, kind) if isinstance(kind, int) else [part.to(kind) for part in floats]
    restored = [kernels.dequantize(p) if isinstance(kind, int) else p.float() for p in parts]
    choice = {"size": torch.rand(150), "keep_count": 30}
    ours, _ = operations.ffn(*moved([x, active(parts, 150, **choice)], device))
    assert error(ours.cpu(), reference.ffn(x, active(restored, 150, **choice))[0]) < 1e-5


def test_plain_by_size_of_the_activation(device, large_blocks):
    x, (fc1, fc2), bias = torch.randn(2, 96), weights(2, 150, 96), torch.randn(150)
    layer = active(
        [fc1, fc2], 100, unsorted_index(100, 150, 20), "relu", [bias, None], size=torch.rand(150), keep_count=90
    )
    (ours, counts), (theirs, expected) = both(device, "ffn", x, layer)
    assert counts == expected
    assert max(counts) < 90  # relu has left fewer
    assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("by_gate", [True, False])
def test_biases_and_choosing_by_the_gate(device, large_blocks, by_gate):
    x, parts, size = torch.randn(2, 64), weights(3, 40, 64), torch.rand(40)
    layer = active(parts, 30, biases=[*torch.randn(2, 40), None], size=size, keep_count=11, by_gate=by_gate)
    (ours, counts), (theirs, expected) = both(device, "ffn", x, layer)
    assert counts == expected
    assert error(ours, theirs) < 1e-5


def test_inputs_of_up_and_rows_of_down(device, large_blocks):
    """As layers by bytes have it: up stored by input, and rows of down that a token leaves out."""
    x, (gate, up, down), size = torch.randn(1, 64), weights(3, 40, 64), torch.rand(40) + 0.5
    by_input = ByInput(up.T.contiguous(), torch.randn(64) / 2, torch.rand(64), torch.zeros(40), 0.3)
    layer = active(
        [gate, by_input.weight, down], 40, size=size, threshold=0.3, up=by_input, down_size=size, down_threshold=0.05
    )
    (ours, counts), (theirs, expected) = both(device, "ffn", x, layer)
    assert counts == expected
    assert error(ours, theirs) < 1e-5
    everything, _ = reference.ffn(x, active([gate, by_input.weight, down], 40, size=size, threshold=0.3, up=by_input))
    assert error(ours, everything) > 1e-3


@pytest.mark.parametrize("size", BY_INPUT_SIZES[:1], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, 8, 4], ids=str)
def test_by_input(device, large_blocks, kind, size):
    inputs, outputs, packed_outputs = size
    (weight,) = weights(1, inputs, packed_outputs if isinstance(kind, int) else outputs)
    weight = kernels.quantize(weight, OF_BITS[kind]) if isinstance(kind, int) else weight.to(kind)
    floats = kernels.dequantize(weight) if isinstance(kind, int) else weight
    x, mean, norm = torch.randn(2, inputs), torch.randn(inputs) / 2, torch.rand(inputs) + 0.5
    for threshold in (-1.0, 0.6):
        layer = ByInput(weight, mean, norm, torch.randn(floats.shape[1]), threshold)
        y, counts = operations.by_input(*moved([x, layer], device))
        apart = x.double() - mean
        read = (apart.abs() * norm > threshold) if threshold >= 0 else torch.ones_like(apart, dtype=torch.bool)
        assert counts.tolist() == read.sum(1).tolist()
        assert error(y.cpu(), layer.constant.double() + (apart * read) @ floats.double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("keep", [700, 2500])
def test_choices_over_many_segments(device, keep):
    """Ascending positions, more of them than one program takes, and ties are cut to the count, the first ones kept."""
    scores = torch.randint(0, 40, (2, 2500)).float() / 8
    chosen, counts = (part.cpu() for part in launch.choose(scores.to(device), keep, None))
    for row, positions, count in zip(scores, chosen, counts.tolist(), strict=True):
        order = torch.argsort(row, descending=True, stable=True)[:keep]
        expected = order[row[order] > 0].sort().values
        assert positions[:count].tolist() == expected.tolist()


def test_what_the_kernels_leave_to_pytorch(device):
    x, parts = torch.randn(1, 64).to(device), [part.to(device) for part in weights(3, 40, 64)]
    assert operations.computes(x, active(parts, 40))
    assert not operations.computes(x, active(parts, 40, activation=torch.tanh))
    assert not operations.reads(parts[0].T, x)
    planes = kernels.split_planes(kernels.quantize(parts[0].cpu(), kernels.INT8)).to(device)
    assert not operations.reads(planes, x)
    assert not operations.reads(parts[0].to("meta"), x)
