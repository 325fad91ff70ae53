"""Screened products are exact where it matters, for weights in planes and for floats."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import Needed, QuantizedTensor, Screen, screening

ROWS, HIDDEN = 700, 96  # rows: more than a piece of the outputs, and no multiple of one


def quantized(rows: int, columns: int, seed: int = 0) -> kernels.QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    return kernels.quantize(torch.randn(rows, columns, generator=generator), kernels.INT8)


def head(spread: float = 3.0, rows: int = ROWS, columns: int = HIDDEN):
    """(x [1, H] float32, weight [rows, H]): logits of that standard deviation, as of a trained model."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator)
    return torch.randn(1, columns, generator=generator) * (spread / columns**0.5), kernels.quantize(
        weight, kernels.INT8
    )


def screened(x, weight, needed=kernels.SOFTMAX):
    packed = kernels.split_planes(weight)
    return kernels.screened_linear(x, packed, Screen.of(packed), needed)


def divergence(exact: torch.Tensor, other: torch.Tensor, temperature: float = 1.0) -> float:
    p, q = ((part.float() / temperature).log_softmax(-1) for part in (exact, other))
    return float((p.exp() * (p - q)).sum(-1).max())


def test_errors_are_those_of_the_high_plane(variant):
    weight = quantized(4000, 64)
    packed = kernels.split_planes(weight)
    screen = Screen.of(packed)
    wrong = (screen.coarse() - kernels.dequantize(weight)).view(4000, 2, 32)
    assert wrong.mean().abs() < 0.02 * wrong.std()
    assert torch.allclose(screen.errors, wrong.square().mean((0, 2)), rtol=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns", [(ROWS, HIDDEN), (515, 576), (3, 32), (1, 64), (600, 1056)])
def test_what_may_be_the_largest_is_exact_and_the_rest_rough(variant, dtype, rows, columns):
    x, weight = head(rows=rows, columns=columns)
    exact = kernels.linear(x.to(dtype), weight).float()
    logits, count = screened(x.to(dtype), weight, Needed(largest=1))
    assert logits.dtype == dtype
    logits, count = logits.float(), int(count)
    assert logits.argmax() == exact.argmax()
    error = 0.02 if dtype == torch.bfloat16 else 0.005
    order = exact[0].argsort(descending=True)
    assert torch.allclose(logits[0, order[:1]], exact[0, order[:1]], atol=error, rtol=error)
    packed = kernels.split_planes(weight)
    rough = x.to(dtype).float() @ Screen.of(packed).coarse().T
    rounded = 0.1  # rough ones have an input of 8 bits in one term
    near = [
        (logits - other).abs()[0] <= wrong + error * exact[0].abs()
        for other, wrong in ((exact, error), (rough, rounded))
    ]
    assert bool((near[0] | near[1]).all())
    assert 1 <= count <= int(near[0].sum())
    if rows > 100:
        assert count < rows / 3
        assert int(near[1].sum()) >= rows - count


def test_the_reference_chooses_the_same_rows(variant):
    x, weight = head()
    groups = x.view(-1, 32)  # an input that has 8 bits, so that rough outputs are the same
    x = (groups / groups.abs().amax(-1, keepdim=True) * 127).round().view(1, -1) / 4096
    packed = kernels.split_planes(weight)
    errors = Screen.of(packed)
    for needed in (Needed(1), Needed(20), Needed(), Needed(tolerance=1e-2), Needed(temperature=2.0)):
        ours, count = kernels.screened_linear(x * 100, packed, errors, needed)
        expected, others = screening.screened_linear(x * 100, packed, errors, needed)
        assert int(count) == int(others)
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needed", [Needed(1), Needed(30), Needed()], ids=str)
def test_float_weights_are_screened_by_their_high_plane(variant, dtype, needed):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3000, HIDDEN, generator=generator).to(dtype)
    x = (torch.randn(2, HIDDEN, generator=generator) * (3 / HIDDEN**0.5)).to(dtype)
    packed = kernels.split_planes(kernels.quantize(weight, kernels.INT8))
    screen = Screen.of(QuantizedTensor(packed.data[0], packed.scales, kernels.INT4))
    logits, count = kernels.screened_linear(x, weight, screen, needed)
    exact = kernels.linear(x, weight)
    error = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    same = torch.isclose(logits, exact, rtol=error, atol=error)
    for t in range(2):
        assert count[t] <= int(same[t].sum())
        assert count[t] < 2000
        top = exact[t].float().topk(max(1, needed.largest)).indices
        assert same[t, top].all()
    if not needed.largest:
        assert divergence(exact, logits) < 2 * needed.tolerance


@pytest.mark.parametrize("tolerance", [3e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_softmax_is_as_near_as_asked_for(variant, tolerance, temperature):
    x, weight = head(rows=5000)
    x = torch.cat([x, x.flip(-1), x * 0.5])
    exact = kernels.linear(x, weight)
    logits, count = screened(x, weight, Needed(tolerance=tolerance, temperature=temperature))
    assert divergence(exact, logits, temperature) < 2 * tolerance
    assert count.max() < 5000
    if tolerance == 1e-2 and temperature == 1.0:
        assert count[0] < 1500


def test_more_is_computed_exactly_the_more_is_asked_for(variant):
    x, weight = head(rows=5000)
    counts = [int(screened(x, weight, Needed(largest=k))[1]) for k in (1, 2, 50, 400, 5000)]
    assert counts == sorted(counts)
    assert counts[0] < 300
    assert counts[-1] > 4900
    exact = kernels.linear(x, weight)
    for k in (50, 400):
        logits, _ = screened(x, weight, Needed(largest=k))
        assert torch.equal(logits.topk(k).indices, exact.topk(k).indices)


def test_tokens_do_not_depend_on_each_other_nor_on_threads(variant, threads):
    x, weight = head(rows=3000)
    x = torch.cat([x, x.flip(-1), x * 0.3])
    threads(1)
    together, counts = screened(x.view(3, 1, HIDDEN), weight)
    assert together.shape == (3, 1, 3000)
    for number in (1, 2, 5):
        threads(number)
        for t in range(3):
            alone, count = screened(x[t : t + 1], weight)
            assert (
                torch.allclose(alone[0], together[t, 0], atol=1e-5)
                if variant == "reference"
                else torch.equal(alone[0], together[t, 0])
            )
            assert int(count) == int(counts[t])


def test_a_zero_input_and_not_a_number(variant):
    _, weight = head()
    logits, _ = screened(torch.zeros(1, HIDDEN), weight)
    assert not logits.any()
    logits, _ = screened(torch.full((1, HIDDEN), torch.nan), weight)
    assert logits.shape == (1, ROWS)


@pytest.mark.skipif(not kernels.available(), reason="the arguments of native kernels")
def test_what_does_not_fit_is_an_error():
    x, weight = head()
    packed, floats = kernels.split_planes(weight), kernels.dequantize(weight)
    screen = Screen.of(packed)
    high = Screen(screen.data[0], screen.scales, screen.errors)
    with pytest.raises(ValueError, match=r"must be uint8, got Char"):
        kernels.screened_linear(x, weight, Screen(weight.data, weight.scales, screen.errors))
    with pytest.raises(
        ValueError, match=r"must be two planes, \[2, rows, columns / 2\], or the high one, got \[1, 700, 48\]"
    ):
        kernels.screened_linear(x, packed, Screen(screen.data[:1], screen.scales, screen.errors))
    with pytest.raises(ValueError, match=r"errors must be contiguous float32 \[3\], got Float \[2\]"):
        kernels.screened_linear(x, packed, Screen(screen.data, screen.scales, screen.errors[:2]))
    with pytest.raises(ValueError, match="the screening weight has 96 columns, x 64"):
        kernels.screened_linear(x[:, :64], packed, screen)
    for weight, wrong in ((packed, high), (floats, screen)):
        with pytest.raises(ValueError, match="the high plane alone needs the whole weight, two planes none"):
            kernels.screened_linear(x, weight, wrong)
    with pytest.raises(ValueError, match=r"weight must be \[700, 96\], got \[699, 96\]"):
        kernels.screened_linear(x, floats[1:], high)
