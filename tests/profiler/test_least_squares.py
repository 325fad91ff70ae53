"""The fit's linear algebra, against formulas written out."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from profiler.least_squares import NormalEquations, best_to_keep, refit
from transformers_patches.errors import PartInferError

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equations_of(*groups: tuple[torch.Tensor, torch.Tensor]) -> NormalEquations:
    features, errors = groups[0]
    equations = NormalEquations(features.shape[1], errors.shape[1], len(groups), CPU)
    for number, (f, e) in enumerate(groups):
        for part_f, part_e in zip(f.split(7), e.split(7), strict=True):
            equations.add(part_f, part_e, torch.ones(len(part_f)), number)
    return equations


def test_solution_and_biases_are_those_of_a_regression_with_an_intercept_per_group():
    first, second = random(60, 5) + 2, random(40, 5, seed=1) - 1
    y1, y2 = random(60, 3, seed=2), random(40, 3, seed=3)
    equations = equations_of((first, y1), (second, y2))
    solution = refit(equations, 0.0)
    group = torch.zeros(100, 2)
    group[:60, 0], group[60:, 1] = 1, 1
    expected = torch.linalg.lstsq(
        torch.cat([torch.cat([first, second]), group], dim=1).double(), torch.cat([y1, y2]).double()
    ).solution
    assert torch.allclose(solution.double(), expected[:5], atol=1e-4)
    assert torch.allclose(torch.stack(equations.biases(solution)).double(), expected[5:], atol=1e-4)
    left = torch.cat([y1, y2]).double() - torch.cat([torch.cat([first, second]), group], dim=1).double() @ expected
    assert equations.error(solution) == pytest.approx(float(left.square().sum() / 100), rel=1e-4)


def test_a_token_of_weight_two_counts_as_two():
    features, errors = random(30, 6), random(30, 2, seed=1)
    repeated = equations_of((torch.cat([features, features[:9]]), torch.cat([errors, errors[:9]])))
    weighted = NormalEquations(6, 2, 1, CPU)
    weights = torch.ones(30)
    weights[:9] = 2
    weighted.add(features, errors, weights, 0)
    solutions = [refit(equations, 0.1) for equations in (repeated, weighted)]
    assert torch.allclose(*solutions, atol=1e-5)
    assert torch.allclose(repeated.biases(solutions[0])[0], weighted.biases(solutions[1])[0], atol=1e-5)
    assert weighted.error(solutions[1]) == pytest.approx(repeated.error(solutions[0]), rel=1e-4)


def test_the_bias_of_a_group_of_little_weight_is_its_mean_error():
    equations = NormalEquations(3, 2, 1, CPU)
    errors = random(1, 2)
    equations.add(random(1, 3, seed=1), errors, torch.tensor([0.25]), 0)
    assert torch.allclose(equations.biases()[0], errors[0], atol=1e-6)
    assert equations.error(None) == pytest.approx(0.0, abs=1e-6)


def test_the_blocks_of_the_gram_matrix_make_it_whole(monkeypatch):
    monkeypatch.setattr("profiler.least_squares.BLOCK_FEATURES", 4)
    features = random(30, 11)
    gram, _ = equations_of((features, random(30, 2, seed=1))).centered()
    assert torch.allclose(gram, torch.cov(features.t().double(), correction=0), atol=1e-5)


def test_dependent_activations_have_a_finite_solution_that_is_as_good_as_any():
    h = random(50, 4)
    h = torch.cat([h, h[:, :2], torch.zeros(50, 1)], dim=1)  # rank 4 of 7
    y = h @ random(7, 3, seed=1)
    equations = equations_of((h, y))
    solution = refit(equations, 0.0)
    assert torch.isfinite(solution).all()
    assert equations.error(solution) < 1e-4 * equations.error(None)


def test_fewer_tokens_than_neurons_and_no_activation_at_all():
    few = equations_of((random(3, 20), random(3, 2, seed=1)))
    assert torch.isfinite(refit(few, 0.01)).all()
    silent = equations_of((torch.zeros(9, 4), random(9, 2)))
    assert torch.equal(refit(silent, 0.0), torch.zeros(4, 2))


def test_nan_is_refused():
    h = random(9, 4)
    h[3, 2] = float("nan")
    with pytest.raises(PartInferError, match="NaN or Inf among the activations"):
        refit(equations_of((h, random(9, 2))), 0.0)


def test_kept_neurons_are_near_the_best_subset():
    h, down = random(400, 8) @ random(8, 8, seed=1), random(8, 5, seed=2)
    gram = torch.cov(h.t(), correction=0)

    def error(kept: list[int]) -> float:
        left = [i for i in range(8) if i not in kept]
        missing = h[:, left] @ down[left]
        equations = equations_of((h[:, kept], missing))
        return equations.error(refit(equations, 0.0))

    ranked = sorted(error(list(kept)) for kept in combinations(range(8), 5))
    assert error(sorted(best_to_keep(gram, down, 5, 0.0).tolist())) <= ranked[2]  # of 56


def test_a_neuron_that_others_can_stand_in_for_is_left_out():
    h = random(300, 6)
    h[:, 5] = h[:, 0] + h[:, 1]  # large, but redundant
    down = random(6, 4, seed=1)
    down[5] *= 3
    kept = best_to_keep(torch.cov(h.t(), correction=0), down, 5, 1e-6)
    assert len({0, 1, 5} & set(kept.tolist())) == 2
