"""The FFN over neurons chosen per token from up·x."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import reference

from .helpers import TOLERANCE, error, paired, quantized_ffn, unsorted_index, weights


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("keep", [0, 1, 40, 150])
@pytest.mark.parametrize("count", [1, 2])
def test_keeps_exactly_so_many(variant, threads, keep, count):
    threads(count)
    x, (gate, up, down) = torch.randn(2, 576), weights(3, 301, 576)
    index, scale = unsorted_index(100, 301, 50), torch.rand(301)
    result, computed = kernels.sparse_ffn_by_up(x, gate, up, down, 100, index, scale, keep)
    expected, _ = reference.sparse_ffn_by_up(x, gate, up, down, 100, index, scale, keep, 0.0, "silu")
    assert computed.tolist() == [keep, keep]
    assert error(result, expected) < 1e-5


def test_everything_kept_is_the_dense_ffn(variant):
    x, (gate, up, down) = torch.randn(1, 64), weights(3, 40, 64)
    result, _ = kernels.sparse_ffn_by_up(x, gate, up, down, 40, None, torch.ones(40), 40)
    assert error(result, reference.sparse_ffn(x, gate, up, down, 40, None, "silu")) < 1e-5


def test_threshold(variant):
    x, (gate, up, down) = torch.randn(1, 64), weights(3, 200, 64)
    scale = torch.rand(200)
    expected = int(((up @ x[0]).abs() * scale > 0.5).sum())
    _, computed = kernels.sparse_ffn_by_up(x, gate, up, down, 200, None, scale, None, 0.5)
    assert 0 < expected < 200
    assert computed.tolist() == [expected]


def test_ties_are_cut_to_the_count(variant):
    x = torch.ones(1, 32)
    same = torch.ones(50, 32)
    _, computed = kernels.sparse_ffn_by_up(x, same, same, same, 50, None, torch.ones(50), 20)
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
    scale = torch.rand(300)
    packed, restored, tolerance = in_kind(floats, kind)
    result, _ = kernels.sparse_ffn_by_up(x, *packed, 300, None, scale, 40)
    expected, _ = reference.sparse_ffn_by_up(x, *restored, 300, None, scale, 40, 0.0, "silu")
    assert error(result, expected) < tolerance


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, 8, 4], ids=str)
def test_rows_that_take_turns_in_memory(variant, kind):
    """Bit for bit, by every way through the rows."""
    x, scale, index = torch.randn(2, 576), torch.rand(300), unsorted_index(100, 300, 50)
    (gate, up, down), _, _ = in_kind(weights(3, 300, 576), kind)
    gate2, down2 = paired(gate, down)
    for run in (
        lambda gate, down: kernels.sparse_ffn_by_up(x, gate, up, down, 100, index, scale, 40)[0],
        lambda gate, down: kernels.sparse_ffn(x, gate, up, down, 100, index, "silu"),
        lambda gate, down: kernels.sparse_ffn(x, gate, up, down, 300, None, "silu"),
        lambda gate, down: kernels.linear(x, down) + kernels.linear(x, gate),
    ):
        assert torch.equal(run(gate2, down2), run(gate, down))


def test_bad_arguments(native):
    gate, up, down = weights(3, 40, 64)
    with pytest.raises(ValueError, match="at most the 30 candidates, got 31"):
        kernels.sparse_ffn_by_up(torch.randn(1, 64), gate, up, down, 30, None, torch.ones(40), 31)
    with pytest.raises(ValueError, match="gate must have contiguous rows"):
        kernels.sparse_ffn_by_up(torch.randn(1, 40), gate.t(), up.t(), down.t(), 30, None, torch.ones(64), 3)
    overlapping = down.as_strided((40, 64), (32, 1))
    with pytest.raises(ValueError, match="down's rows overlap"):
        kernels.sparse_ffn_by_up(torch.randn(1, 64), gate, up, overlapping, 30, None, torch.ones(40), 3)
    with pytest.raises(ValueError, match=r"scale must be contiguous float32 \[40\]"):
        kernels.sparse_ffn_by_up(torch.randn(1, 64), gate, up, down, 30, None, torch.ones(39), 3)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("keep", [0, 1, 40, None])
def test_plain_by_size_of_the_activation(variant, activation, keep):
    x, (fc1, fc2), bias = torch.randn(2, 576), weights(2, 301, 576), torch.randn(301)
    choice = (100, unsorted_index(100, 301, 50), torch.rand(301), keep, 0.2, activation)
    result, computed = kernels.sparse_ffn_plain_by_size(x, fc1, bias, fc2, *choice)
    expected, counts = reference.sparse_ffn_plain_by_size(x, fc1, bias, fc2, *choice)
    assert computed.tolist() == counts.tolist()
    assert error(result, expected) < 1e-5


def test_plain_never_computes_what_relu_leaves_at_zero(variant):
    x, (fc1, fc2) = torch.randn(1, 64), weights(2, 200, 64)
    alive = int((fc1 @ x[0] > 0).sum())
    result, computed = kernels.sparse_ffn_plain_by_size(x, fc1, None, fc2, 200, None, torch.ones(200), 190)
    assert computed.tolist() == [alive]
    assert 50 < alive < 150
    assert error(result, reference.sparse_ffn(x, fc1, None, fc2, 200, None, "relu")) < 1e-5


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, 8, 4], ids=str)
def test_plain_with_other_weights(variant, kind):
    x, floats, bias, scale = torch.randn(1, 576), weights(2, 300, 576), torch.randn(300), torch.rand(300)
    packed, restored, tolerance = in_kind(floats, kind)
    result, _ = kernels.sparse_ffn_plain_by_size(x, packed[0], bias, packed[1], 300, None, scale, 40)
    expected, _ = reference.sparse_ffn_plain_by_size(
        x, restored[0], bias, restored[1], 300, None, scale, 40, 0.0, "relu"
    )
    assert error(result, expected) < tolerance
