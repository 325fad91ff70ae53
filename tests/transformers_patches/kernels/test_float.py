"""ffn and linear with float weights, against float64 in PyTorch."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import ActiveNeurons, Projections, reference

from .cases import FFN_SIZES
from .helpers import TOLERANCE, active, double, error, exact_ffn, ffn, unsorted_index, weights

DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", FFN_SIZES, ids=str)
def test_gated_ffn(variant, dtype, size):
    tokens, columns, rows, prefix, listed = size
    x, (gate, up, down) = torch.randn(tokens, columns).to(dtype), weights(3, rows, columns, dtype)
    index = unsorted_index(prefix, rows, listed)
    for activation in reference.ACTIVATIONS:
        result = ffn(x, [gate, up, down], prefix, index, activation)
        expected = exact_ffn(x, [gate, up, down], prefix, index, activation)
        assert result.dtype == dtype
        assert error(result, expected) < TOLERANCE[dtype], activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", FFN_SIZES, ids=str)
def test_plain_ffn(variant, dtype, size):
    tokens, columns, rows, prefix, listed = size
    x, (fc1, fc2) = torch.randn(tokens, columns).to(dtype), weights(2, rows, columns, dtype)
    index, bias = unsorted_index(prefix, rows, listed), torch.randn(rows).to(dtype)
    for activation in ("relu", "gelu"):
        result = ffn(x, [fc1, fc2], prefix, index, activation, [bias, None])
        expected = exact_ffn(x, [fc1, fc2], prefix, index, activation, biases=[bias, None])
        assert error(result, expected) < TOLERANCE[dtype], activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", FFN_SIZES, ids=str)
def test_linear(variant, dtype, size):
    tokens, columns, rows, *_ = size
    x, (weight,) = torch.randn(tokens, columns).to(dtype), weights(1, rows, columns, dtype)
    bias = torch.randn(rows).to(dtype)
    expected = torch.nn.functional.linear(*double(x, weight, bias))
    assert error(kernels.linear(x, weight, bias), expected) < TOLERANCE[dtype]
    assert error(kernels.linear(x, weight), expected - bias.double()) < TOLERANCE[dtype]


def test_linear_without_columns_is_the_bias(variant):
    x, weight, bias = torch.empty(2, 3, 0), torch.empty(40, 0), torch.randn(40)
    torch.full((4096,), 7.0)  # so that memory that is not written holds something else than zeros
    assert torch.equal(kernels.linear(x, weight), torch.zeros(2, 3, 40))
    assert torch.equal(kernels.linear(x, weight, bias), bias.expand(2, 3, 40))


@pytest.mark.parametrize(("prefix", "listed"), [(0, 1), (1, 0), (40, 0), (0, 40), (0, 0)])
def test_one_all_and_no_neurons(variant, prefix, listed):
    x, (gate, up, down) = torch.randn(1, 64), weights(3, 40, 64)
    index = unsorted_index(prefix, 40, listed)
    result = ffn(x, [gate, up, down], prefix, index)
    expected = exact_ffn(x, [gate, up, down], prefix, index)
    assert error(result, expected) < 1e-5


def test_biases_of_a_gated_ffn(variant):
    x, (gate, up, down) = torch.randn(3, 48), weights(3, 40, 48)
    biases = [torch.randn(40), torch.randn(40), None]
    index = unsorted_index(10, 40, 7)
    result = ffn(x, [gate, up, down], 10, index, biases=biases)
    expected = exact_ffn(x, [gate, up, down], 10, index, biases=biases)
    assert error(result, expected) < 1e-5


@pytest.mark.parametrize("tokens", [1, 3])
def test_every_active_neuron_is_counted(variant, tokens):
    x, layer = torch.randn(2, tokens, 48), active(weights(3, 40, 48), 10, unsorted_index(10, 40, 7))
    _, computed = kernels.ffn(x, layer)
    assert computed.dtype == torch.int64
    assert computed.tolist() == [17] * (2 * tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_are_added_to_every_token(variant, dtype):
    x, parts, added = torch.randn(3, 48).to(dtype), weights(3, 40, 48, dtype), torch.randn(2, 48).to(dtype)
    y, _ = kernels.ffn(x, active(parts, 40, added=list(added)))
    assert torch.equal(y, ffn(x, parts, 40) + added[0] + added[1])


def test_a_bias_of_the_output_projection_is_refused():
    with pytest.raises(ValueError, match="put it into `added`"):
        active(weights(2, 40, 48), 40, biases=[None, torch.ones(48)])


def test_a_function_as_activation_is_left_to_pytorch(variant):
    x, parts = torch.randn(2, 48), weights(3, 40, 48)
    layer = active(parts, 40, activation=torch.tanh)
    assert not layer.native
    gate, up, down = parts
    torch.testing.assert_close(kernels.ffn(x, layer)[0], (torch.tanh(x @ gate.T) * (x @ up.T)) @ down)


def test_leading_dimensions_are_kept(variant):
    x, (gate, up, down) = torch.randn(1, 2, 48), weights(3, 40, 48)
    assert ffn(x, [gate, up, down], 40).shape == x.shape
    assert kernels.linear(x, gate).shape == (1, 2, 40)


def test_float32_input_for_bfloat16_weights(variant):
    x, (gate, up, down) = torch.randn(1, 96), weights(3, 50, 96, torch.bfloat16)
    result = ffn(x, [gate, up, down], 50)
    assert result.dtype == torch.float32
    assert error(result, exact_ffn(x, [gate, up, down], 50)) < 1e-2


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_threads_change_nothing_but_rounding(variant, threads, count):
    # Large enough to be shared out: more than 64 KB for each thread.
    x, (gate, up, down) = torch.randn(1, 512), weights(3, 1001, 512)
    index = unsorted_index(300, 1001, 101)
    threads(count)
    result = ffn(x, [gate, up, down], 300, index)
    assert error(result, exact_ffn(x, [gate, up, down], 300, index)) < 1e-5
    assert error(kernels.linear(x, gate), torch.nn.functional.linear(*double(x, gate))) < 1e-5
    assert torch.equal(result, ffn(x, [gate, up, down], 300, index))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("prefix", [0, 900, 2001])
def test_whoever_takes_the_last_rows_changes_no_bit(variant, threads, count, prefix):
    """They go to the threads that are done first, another one each time."""
    x, (gate, up, down) = torch.randn(2, 512), weights(3, 2001, 512)
    index, size = unsorted_index(prefix, 2001, (2001 - prefix) // 2), torch.rand(2001)
    threads(count)
    calls = [
        lambda: ffn(x, [gate, up, down], prefix, index),
        lambda: ffn(x, [gate, up, down], prefix, index, size=size, keep_count=700),
        lambda: kernels.linear(x, gate),
    ]
    for call in calls:
        first = call()
        assert all(torch.equal(call(), first) for _ in range(10))
    expected = exact_ffn(x, [gate, up, down], prefix, index)
    assert error(calls[0](), expected) < 1e-5
    assert error(calls[2](), torch.nn.functional.linear(*double(x, gate))) < 1e-5


def test_rows_of_fc2_are_skipped_where_relu_gives_zero(variant):
    """A row that must not be read holds NaN."""
    x, (fc1, fc2) = torch.randn(1, 64), weights(2, 700, 64)
    bias = torch.where(torch.arange(700) % 3 == 0, 100.0, -100.0)
    if variant == "reference":
        pytest.skip("PyTorch multiplies by the zeros")
    fc2[bias < 0] = torch.nan
    result = ffn(x, [fc1, fc2], 700, biases=[bias, None])
    rows = torch.arange(0, 700, 3).int()
    assert error(result, exact_ffn(x, [fc1, fc2], 0, rows, biases=[bias, None])) < 1e-5


def test_extreme_activations_stay_finite(variant):
    """exp must not overflow: silu(-1000) is 0, silu(1000) is 1000, and relu² of it 1000²."""
    x = torch.ones(1, 32)
    gate = torch.cat((torch.full((8, 32), -1000 / 32), torch.full((8, 32), 1000 / 32)))
    up, down = torch.full((16, 32), 1 / 32), torch.eye(32)[:16].contiguous()
    for activation in reference.ACTIVATIONS:
        result = ffn(x, [gate, up, down], 16, None, activation)
        high = 1000.0**2 if activation == "relu2" else 1000.0
        torch.testing.assert_close(result, torch.tensor([[0.0] * 8 + [high] * 8 + [0.0] * 16]), atol=1e-4, rtol=1e-5)


BAD_ARGUMENTS = {
    "index must be in": {"index": torch.tensor([40], dtype=torch.int32)},
    "got values from -1": {"index": torch.tensor([-1], dtype=torch.int32)},
    r"\[prefix, rows\) = \[5, 40\)": {"index": torch.tensor([4], dtype=torch.int32)},
    "index must be a contiguous list of int32": {"index": torch.tensor([7])},
    r"prefix must be in \[0, 40\], got 41": {"prefix": 41},
    "activation must be": {"activation": "tanh"},
    r"gate must be \[40, 32\]": {"x": torch.randn(1, 32)},
    r"up must be \[40, 48\]": {"up": torch.randn(39, 48)},
    "down must be Float like the other weights": {"down": torch.randn(40, 48).bfloat16()},
    "down must have contiguous rows": {"down": torch.randn(48, 40).t()},
    "x must be float32, bfloat16 or float16, got Double": {"x": torch.randn(1, 48).double()},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments(native, message):
    gate, up, down = weights(3, 40, 48)
    given = {"x": torch.randn(1, 48), "gate": gate, "up": up, "down": down, "prefix": 5, "index": None}
    given = {**given, "activation": "silu", **BAD_ARGUMENTS[message]}
    projections = Projections([given.pop("gate"), given.pop("up"), given.pop("down")], [], [None] * 3, None)
    with pytest.raises(ValueError, match=message):
        kernels.ffn(given.pop("x"), ActiveNeurons(projections, **given))


def test_compiles_with_torch(native):
    """Fake implementations: one graph without breaks, same result."""
    x, (gate, up, down) = torch.randn(1, 64), weights(3, 40, 64)
    index = unsorted_index(10, 40, 7)

    neurons = active([gate, up, down], 10, index)

    def layer(x):
        return kernels.linear(kernels.ffn(x, neurons)[0], gate)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    "name", ["sparse_ffn", "linear", "sparse_ffn_plain", "sparse_ffn_by_up", "sparse_ffn_plain_by_size"]
)
def test_ops_are_well_registered(native, name):
    x, (gate, up, down) = torch.randn(1, 64), weights(3, 40, 64)
    index = unsorted_index(10, 40, 7)
    layers = {
        "sparse_ffn": active([gate, up, down], 10, index),
        "sparse_ffn_plain": active([gate, down], 10, index),
        "sparse_ffn_by_up": active([gate, up, down], 10, index, size=torch.ones(40), keep_count=5),
        "sparse_ffn_plain_by_size": active([gate, down], 10, index, size=torch.ones(40), keep_count=5),
    }
    op, arguments = torch.ops.partinfer.linear.default, (gate, None)
    if name in layers:
        kernels.ffn(x, layers[name])
        op, arguments, *_ = layers[name].native_call
    assert op is getattr(torch.ops.partinfer, name).default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (x, *arguments), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_rounded_to_the_nearest(variant, dtype):
    """Half to even, infinities and NaNs too."""
    if variant == "reference":
        pytest.skip("PyTorch multiplies in the weights' type and rounds itself")
    values = torch.cat(
        [
            torch.randn(1001) * torch.logspace(-6, 4, 1001),
            1 + torch.arange(64) / 2**12,  # halfway between two bfloat16 or float16 values, and beside
            torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")]),
        ]
    )
    result = kernels.linear(torch.ones(1, 1, dtype=dtype), values[:, None])[0]
    assert torch.equal(result.nan_to_num(7), values.to(dtype).nan_to_num(7))
    assert torch.equal(result.isnan(), values.isnan())
