"""Whole numbers for a weight whose scales are known, one input after the other, each making up for those before it.

The output of a linear layer is a sum over inputs. What rounding the weights of one input changes in it can be made up for by
the weights of inputs that are not rounded yet, as far as the inputs go together. With M = E[x xᵀ], the best change of the
weights W[k] of the inputs k > j after an error e in those of input j is −e U[j, k] / U[j, j], U the upper Cholesky factor of
M⁻¹. That is GPTQ (arXiv 2210.17323), a form of Optimal Brain Surgeon (Hassibi & Stork 1993) for all outputs at once.

C inputs, R outputs. Weights are [C, R] here: a row is what one input is multiplied with.
"""

from __future__ import annotations

import torch

DAMPING = 0.01  # added to M's diagonal, relative to its mean: texts show less than all directions
_STRONGER = 10.0  # times the damping, where a factor does not exist
_AT_ONCE = 128  # inputs between two updates of all later ones


def rounded(
    weights: torch.Tensor, scales: torch.Tensor, moment: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """The whole numbers that, times their scales, change the layer's output least: int8 [C, R].

    weights, scales: float32 [C, R]; a scale of 0 stands for weights of 0.
    moment: float32 [C, C], E[x xᵀ] of the inputs, up to a factor.
    lowest, highest: the range of the whole numbers.

    The largest inputs come first: what they lose can be made up for by more others.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    left, scales = weights[order], scales[order]
    factor = inverse_factor(moment[order][:, order])
    values = torch.empty_like(left)
    for start in range(0, len(left), _AT_ONCE):
        block = slice(start, min(start + _AT_ONCE, len(left)))
        own, here = factor[block, block], left[block]
        errors = torch.empty_like(here)
        for j in range(len(here)):
            scale = scales[start + j]
            number = torch.where(scale == 0, 0.0, here[j] / scale).round_().clamp_(lowest, highest)
            values[start + j] = number
            errors[j] = (here[j] - number * scale) / own[j, j]
            here[j + 1 :].addr_(own[j, j + 1 :], errors[j], alpha=-1)
        left[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    result = torch.empty(left.shape, dtype=torch.int8)
    result[order] = values.to(torch.int8)
    return result


def inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """The upper triangular U with Uᵀ U the inverse of a second moment [C, C], which is damped as far as it takes.

    From the other end M is V Vᵀ with V upper triangular, and U is the inverse of V: M itself is not inverted.
    """
    damping, mean = DAMPING, float(moment.diagonal().mean()) or 1.0
    while True:
        damped = moment.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper = _inverse_of_upper(lower.flip(0, 1))
            if bool(torch.isfinite(upper).all()):
                return upper
        damping *= _STRONGER


def _inverse_of_upper(upper: torch.Tensor) -> torch.Tensor:
    """The inverse of an upper triangular matrix, by halves: most of the work is products of large matrices."""
    size, half = len(upper), len(upper) // 2
    if size <= _AT_ONCE:
        return torch.linalg.solve_triangular(upper, torch.eye(size), upper=True)
    result = torch.zeros_like(upper)
    first, last = _inverse_of_upper(upper[:half, :half]), _inverse_of_upper(upper[half:, half:])
    result[:half, :half], result[half:, half:] = first, last
    torch.matmul(first @ upper[:half, half:], last, out=result[:half, half:]).neg_()
    return result
