"""Rounding with feedback against plain rounding, and against the method written down as its paper says it."""

from __future__ import annotations

import pytest
import torch

from profiler.rounding.feedback import DAMPING, inverse_factor, rounded

INPUTS, OUTPUTS = 160, 24  # more inputs than are updated at once
LOWEST, HIGHEST = -8, 7


def weights_and_scales() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(INPUTS, OUTPUTS, generator=generator)
    return weights, torch.full_like(weights, 0.3)


def moment(rank: int, *, noise: float = 0.05) -> torch.Tensor:
    """Of inputs that go together: `rank` of them, mixed."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4000, rank, generator=generator) @ torch.randn(rank, INPUTS, generator=generator)
    x += noise * torch.randn(x.shape, generator=generator)
    return x.T @ x / len(x)


def plain(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (weights / scales).round().clamp(LOWEST, HIGHEST)


def error(weights: torch.Tensor, scales: torch.Tensor, numbers: torch.Tensor, of: torch.Tensor) -> float:
    """E|x·(W − rounded)|², summed over outputs."""
    difference = weights - numbers.float() * scales
    return float((difference * (of @ difference)).sum())


def by_the_paper(weights: torch.Tensor, scales: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Optimal Brain Surgeon with the inverse of what is left, made anew for every input, in double precision."""
    order = of.diagonal().argsort(descending=True, stable=True)
    left, scales, of = weights[order].double(), scales[order].double(), of[order][:, order].double()
    of += DAMPING * of.diagonal().mean() * torch.eye(INPUTS, dtype=torch.double)
    numbers = torch.empty_like(left)
    for j in range(INPUTS):
        inverse = torch.linalg.inv(of[j:, j:])
        numbers[j] = (left[j] / scales[j]).round().clamp(LOWEST, HIGHEST)
        mistake = (left[j] - numbers[j] * scales[j]) / inverse[0, 0]
        left[j:] -= inverse[:, :1] * mistake
    result = torch.empty_like(numbers)
    result[order] = numbers
    return result


@pytest.mark.parametrize("rank", [20, 80])
def test_outputs_change_less_than_by_plain_rounding(rank):
    weights, scales = weights_and_scales()
    of = moment(rank)
    numbers = rounded(weights, scales, of, LOWEST, HIGHEST)
    assert numbers.dtype == torch.int8
    assert int(numbers.min()) >= LOWEST
    assert int(numbers.max()) <= HIGHEST
    before, after = error(weights, scales, plain(weights, scales), of), error(weights, scales, numbers, of)
    assert after < 0.5 * before


def test_the_same_as_the_paper_says():
    weights, scales = weights_and_scales()
    of = moment(80)
    ours, theirs = rounded(weights, scales, of, LOWEST, HIGHEST), by_the_paper(weights, scales, of)
    assert (ours == theirs).float().mean() > 0.98  # ties fall differently in single precision
    assert error(weights, scales, ours, of) == pytest.approx(error(weights, scales, theirs.float(), of), rel=0.05)


def test_inputs_that_do_not_go_together_are_rounded_each_by_itself():
    weights, scales = weights_and_scales()
    numbers = rounded(weights, scales, torch.diag(torch.rand(INPUTS) + 0.1), LOWEST, HIGHEST)
    assert torch.equal(numbers.float(), plain(weights, scales))


def test_inputs_that_were_never_there_and_scales_of_zero():
    weights, scales = weights_and_scales()
    of = moment(20)
    of[:5], of[:, :5], weights[7], scales[7] = 0, 0, 0, 0
    numbers = rounded(weights, scales, of, LOWEST, HIGHEST)
    assert torch.equal(numbers[:5].float(), plain(weights, scales)[:5])
    assert not numbers[7].any()
    assert torch.isfinite(inverse_factor(torch.zeros(4, 4))).all()
