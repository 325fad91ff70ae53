"""The FFN over neurons that every token chooses: by up·x, or in a plain FFN by their activation."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import reference

from .helpers import TOLERANCE, active, error, ffn, paired, quantized_ffn, unsorted_index, weights


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("keep", [0, 1, 40, 150])
@pytest.mark.parametrize("count", [1, 2])
def test_keeps_exactly_so_many(variant, threads, keep, count):
    threads(count)
    x, parts = torch.randn(2, 576), weights(3, 301, 576)
    layer = active(parts, 100, unsorted_index(100, 301, 50), size=torch.rand(301), keep_count=keep)
    result, computed = kernels.ffn(x, layer)
    expected, _ = reference.ffn(x, layer)
    assert computed.tolist() == [keep, keep]
    assert error(result, expected) < 1e-5


def test_everything_kept_is_the_dense_ffn(variant):
    x, parts = torch.randn(1, 64), weights(3, 40, 64)
    result = ffn(x, parts, 40, size=torch.ones(40), keep_count=40)
    assert error(result, reference.ffn(x, active(parts, 40))[0]) < 1e-5


def test_threshold(variant):
    x, (gate, up, down) = torch.randn(1, 64), weights(3, 200, 64)
    size = torch.rand(200)
    expected = int(((up @ x[0]).abs() * size > 0.5).sum())
    _, computed = kernels.ffn(x, active([gate, up, down], 200, size=size, threshold=0.5))
    assert 0 < expected < 200
    assert computed.tolist() == [expected]


def test_ties_are_cut_to_the_count(variant):
    x = torch.ones(1, 32)
    same = torch.ones(50, 32)
    _, computed = kernels.ffn(x, active([same, same, same], 50, size=torch.ones(50), keep_count=20))
    assert computed.tolist() == [20]


def in_kind(floats, kind):
    """Weights in a float type or in so many bits, the floats that they stand for, and how exact products are."""
    if isinstance(kind, int):
        packed = quantized_ffn(floats, kind)
        return packed, [kernels.dequantize(weight) for weight in packed], 0.06
    packed = [weight.to(kind) for weight in floats]
    return packed, [weight.float() for weight in packed], TOLERANCE[kind]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, 8, 4], ids=str)
def test_other_weights(variant, kind):
    """The choice may differ where two candidates are nearly equal: few neurons of 40, so little of the result."""
    x, floats = torch.randn(1, 576), weights(3, 300, 576)
    choice = {"size": torch.rand(300), "keep_count": 40}
    packed, restored, tolerance = in_kind(floats, kind)
    result = ffn(x, packed, 300, **choice)
    expected, _ = reference.ffn(x, active(restored, 300, **choice))
    assert error(result, expected) < tolerance


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, 8, 4], ids=str)
def test_interleaved_rows(variant, kind):
    """Bit for bit, by every way through the rows."""
    x, size, index = torch.randn(2, 576), torch.rand(300), unsorted_index(100, 300, 50)
    (gate, up, down), _, _ = in_kind(weights(3, 300, 576), kind)
    gate2, down2 = paired(gate, down)
    for run in (
        lambda gate, down: ffn(x, [gate, up, down], 100, index, size=size, keep_count=40),
        lambda gate, down: ffn(x, [gate, up, down], 100, index),
        lambda gate, down: ffn(x, [gate, up, down], 300),
        lambda gate, down: kernels.linear(x, down) + kernels.linear(x, gate),
    ):
        assert torch.equal(run(gate2, down2), run(gate, down))


def test_bad_arguments(native):
    x, (gate, up, down) = torch.randn(1, 64), weights(3, 40, 64)
    with pytest.raises(ValueError, match="at most the 30 candidates, got 31"):
        ffn(x, [gate, up, down], 30, size=torch.ones(40), keep_count=31)
    with pytest.raises(ValueError, match="gate must have contiguous rows"):
        ffn(torch.randn(1, 40), [gate.t(), up.t(), down.t()], 30, size=torch.ones(64), keep_count=3)
    overlapping = down.as_strided((40, 64), (32, 1))
    with pytest.raises(ValueError, match="down's rows overlap"):
        ffn(x, [gate, up, overlapping], 30, size=torch.ones(40), keep_count=3)
    with pytest.raises(ValueError, match=r"scale must be contiguous float32 \[40\]"):
        ffn(x, [gate, up, down], 30, size=torch.ones(39), keep_count=3)


@pytest.mark.parametrize("by_gate", [True, False])
def test_biases_and_choosing_by_the_gate_are_left_to_pytorch(variant, by_gate):
    x, (gate, up, down), size = torch.randn(2, 64), weights(3, 40, 64), torch.rand(40)
    bias_gate, bias_up = torch.randn(2, 40)
    layer = active([gate, up, down], 30, biases=[bias_gate, bias_up, None], size=size, keep_count=11, by_gate=by_gate)
    assert not layer.native
    activations, products = torch.nn.functional.silu(x @ gate.T + bias_gate), x @ up.T + bias_up
    scores = ((activations if by_gate else products).abs() * size)[:, :30]
    h = (activations * products)[:, :30] * (scores >= scores.topk(11).values[:, -1:])
    y, computed = kernels.ffn(x, layer)
    assert computed.tolist() == [11, 11]
    torch.testing.assert_close(y, h @ down[:30])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("keep", [0, 1, 40, None])
def test_plain_by_size_of_the_activation(variant, activation, keep):
    x, (fc1, fc2), bias = torch.randn(2, 576), weights(2, 301, 576), torch.randn(301)
    choice = {"size": torch.rand(301), "keep_count": keep, "threshold": 0.2}
    layer = active([fc1, fc2], 100, unsorted_index(100, 301, 50), activation, [bias, None], **choice)
    result, computed = kernels.ffn(x, layer)
    expected, counts = reference.ffn(x, layer)
    assert computed.tolist() == counts.tolist()
    assert error(result, expected) < 1e-5


def test_plain_never_computes_what_relu_leaves_at_zero(variant):
    x, (fc1, fc2) = torch.randn(1, 64), weights(2, 200, 64)
    alive = int((fc1 @ x[0] > 0).sum())
    result, computed = kernels.ffn(x, active([fc1, fc2], 200, size=torch.ones(200), keep_count=190))
    assert computed.tolist() == [alive]
    assert 50 < alive < 150
    assert error(result, reference.ffn(x, active([fc1, fc2], 200))[0]) < 1e-5


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, 8, 4], ids=str)
def test_plain_with_other_weights(variant, kind):
    x, floats, biases = torch.randn(1, 576), weights(2, 300, 576), [torch.randn(300), None]
    packed, restored, tolerance = in_kind(floats, kind)
    choice = {"size": torch.rand(300), "keep_count": 40}
    result = ffn(x, packed, 300, biases=biases, **choice)
    expected, _ = reference.ffn(x, active(restored, 300, biases=biases, **choice))
    assert error(result, expected) < tolerance
