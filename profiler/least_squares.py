"""The linear algebra of the fit: normal equations with intercepts, and the choice of the neurons to keep."""

from __future__ import annotations

import math

import torch

from transformers_patches.errors import PartInferError

BLOCK_ROWS = 4096  # tokens in one matrix product
BLOCK_FEATURES = 1024  # block size of the symmetric Gram matrix; only blocks on and above the diagonal are summed
MIN_RIDGE = 1e-6  # keeps the covariance of linearly dependent activations invertible
DOUBLE_SIZE = 2048  # up to this many neurons are chosen among in float64; for more it would take too long
ELIMINATION_STEPS = 64  # `best_to_keep` eliminates neurons in this many blocks


class NormalEquations:
    """E[f f^T] and E[f e^T] of features f and errors e, centred on the means of each of several groups of tokens.

    Each group (prefilled or decoded tokens) has its own bias, which takes care of its means. Large sums are float32 and
    taken in blocks, small ones are float64. `tokens` holds the total weight of each group.
    """

    def __init__(self, features: int, outputs: int, groups: int, device: torch.device) -> None:
        self._gram = torch.zeros(features, features, device=device)  # its lower blocks are never written
        self.cross = torch.zeros(features, outputs, device=device)
        self.squares = 0.0
        self.feature_sums = torch.zeros(groups, features, device=device)
        self.error_sums = torch.zeros(groups, outputs, device=device)
        self.tokens = [0.0] * groups

    def add(self, features: torch.Tensor, errors: torch.Tensor, weights: torch.Tensor, group: int) -> None:
        """Add tokens of one group. A token of weight 2 counts as two.

        features: [T, F]
        errors: [T, H]
        weights: [T]
        """
        parts = (values.split(BLOCK_ROWS) for values in (features, errors, weights))
        for f, e, w in zip(*parts, strict=True):
            root = w.float().sqrt()[:, None]
            f, e = f.float() * root, e.float() * root
            for first in range(0, f.shape[1], BLOCK_FEATURES):
                block = slice(first, first + BLOCK_FEATURES)
                self._gram[block, first:].addmm_(f[:, block].t(), f[:, first:])
            self.cross.addmm_(f.t(), e)
            self.feature_sums[group] += root[:, 0] @ f
            self.error_sums[group] += root[:, 0] @ e
            self.squares += float(e.square().sum(dtype=torch.float64))
            self.tokens[group] += float(w.sum(dtype=torch.float64))

    def _whole_gram(self) -> torch.Tensor:
        """float64 [F, F]."""
        upper = self._gram.double().triu_()
        return upper + upper.triu(1).t()

    def centered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [F, F] and [F, H], per token."""
        gram, cross = self._whole_gram(), self.cross.double()
        for sums, errors, tokens in zip(self.feature_sums, self.error_sums, self.tokens, strict=True):
            if tokens:
                gram -= torch.outer(sums.double(), sums.double()) / tokens
                cross -= torch.outer(sums.double(), errors.double()) / tokens
        total = sum(self.tokens) or 1.0
        return gram / total, cross / total

    def biases(self, solution: torch.Tensor | None = None) -> list[torch.Tensor]:
        """float32 [H] for each group: the mean error that the solution leaves; zeros for a group without tokens."""
        biases = []
        for sums, errors, tokens in zip(self.feature_sums, self.error_sums, self.tokens, strict=True):
            explained = 0 if solution is None else sums @ solution
            biases.append((errors - explained) / (tokens or 1.0))
        return biases

    def error(self, solution: torch.Tensor | None) -> float:
        """Mean squared length, per token, of the error that the solution and its biases leave."""
        total = sum(self.tokens) or 1.0
        left = self.squares / total
        if solution is not None:
            gram, cross = self._whole_gram() / total, self.cross.double() / total
            map_ = solution.double()
            left += float((map_ * (gram @ map_)).sum()) - 2 * float((map_ * cross).sum())
        for bias, tokens in zip(self.biases(solution), self.tokens, strict=True):
            left -= tokens / total * float(bias.double().square().sum())
        return max(left, 0.0)


def solve_symmetric(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """matrix^-1 right, for a symmetric matrix that should be positive definite (see `cholesky`)."""
    return torch.cholesky_solve(right, cholesky(matrix))


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor. The diagonal of `matrix` is increased, in place, until there is one."""
    raised = 0.0
    scale = float(matrix.diagonal().mean())
    for attempt in range(8):
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return factor
        more = scale * 10.0 ** (attempt - 10)
        matrix.diagonal().add_(more - raised)
        raised = more
    raise PartInferError("the activations can't be fitted (their covariance is not positive): use --dtype float32")


def refit(equations: NormalEquations, ridge: float) -> torch.Tensor:
    """float32 [L, H]: the change of the down rows that removes most of the error.

    Raises PartInferError for NaN or Inf.

    equations: their features are the activations
    ridge: pull towards no change, as a share of the features' mean variance
    """
    gram, cross = equations.centered()
    if not (torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        raise PartInferError("NaN or Inf among the activations: use --dtype float32, or leave the text out")
    diagonal = gram.diagonal()
    diagonal.add_(max(ridge, MIN_RIDGE) * float(diagonal.mean()) or 1.0)
    return solve_symmetric(gram, cross).float()


def product_of(solution: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(left, right), float32 [L, r] and [r, H]: the best approximation of h -> solution^T h of rank r.

    gram: [L, L], covariance of the activations
    """
    full = solution.double()
    _, directions = torch.linalg.eigh(full.t() @ gram.double() @ full)
    right = directions[:, -rank:].flip(1).t()
    return (full @ right.t()).float().contiguous(), right.float().contiguous()


def best_to_keep(gram: torch.Tensor, down: torch.Tensor, keep: int, ridge: float) -> torch.Tensor:
    """int64 [keep], best first: the neurons that, once refitted, best reproduce the output of all N.

    Neurons are eliminated in blocks, each time those with the smallest |d_i|^2 / [G^-1]_ii. That is the error from
    eliminating neuron i alone and refitting the other rows, where d are the rows refitted so far. This is the Optimal
    Brain Surgeon (Hassibi and Stork 1993), applied to rows as in ZipLM (Kurtic et al. 2023, arXiv 2302.04089).

    gram: float [N, N], covariance of all activations
    down: [N, H]
    """
    size = len(gram)
    scale = float(gram.diagonal().mean())
    damped = gram.to(torch.float64 if size <= DOUBLE_SIZE else torch.float32, copy=True)
    damped.diagonal().add_(max(ridge, MIN_RIDGE) * scale or 1.0)
    inverse = torch.cholesky_inverse(cholesky(damped)).float()
    del damped
    rows = down.float().clone()
    alive = torch.ones(size, dtype=torch.bool, device=gram.device)
    block = max(1, math.ceil((size - keep) / ELIMINATION_STEPS))
    left = size
    while left > keep:
        scores = _leaving_out(rows, inverse).masked_fill(~alive, math.inf)
        out = scores.topk(min(block, left - keep), largest=False).indices
        among = torch.linalg.inv(inverse[out][:, out].double()).float()
        columns = inverse[:, out].clone()
        step = columns @ among
        rows.addmm_(step, rows[out], alpha=-1)
        inverse.addmm_(step, columns.t(), alpha=-1)  # in place: fresh N x N memory would cost more than the product
        alive[out] = False
        left -= len(out)
    scores = _leaving_out(rows, inverse).masked_fill(~alive, -math.inf)
    return scores.topk(keep).indices


def _leaving_out(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(1) / inverse.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
