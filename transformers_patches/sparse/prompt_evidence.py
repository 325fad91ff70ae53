"""What a prompt says about the loaded neurons of a layer, and which neurons decoding computes because of it.

One Evidence per sequence and layer: `observe` while the prompt is prefilled, `choose` at its end. L loaded neurons,
K computed of which the first base_count always are; h_t,i is the activation of neuron i at prompt token t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from transformers_patches import kernels
from transformers_patches.kernels import Weight
from transformers_patches.plan.load_plan import LayerPlan
from transformers_patches.sparse.prior import PRIOR_TOKENS, Prior

GLOBAL_WEIGHT = 0.5  # of the neuron file's ranks against the prompt's


class Evidence(ABC):
    """Collects one sequence's prompt activations and chooses from them."""

    def __init__(
        self, plan: LayerPlan, prior: Prior, down: Weight, device: torch.device, token_sparsity: float = 0.0
    ) -> None:
        """down: [L, H], the loaded rows of the output projection.
        token_sparsity: for CoreNeurons, the share of positive activations that a token marks.
        """
        self.plan, self.prior, self.down, self.token_sparsity = plan, prior, down, token_sparsity
        self.tokens = 0
        self.begin(device)

    @abstractmethod
    def begin(self, device: torch.device) -> None:
        """Make what is collected, empty."""

    @abstractmethod
    def observe(self, h: torch.Tensor) -> None:
        """Take in h [T, L], the activations of prompt tokens, no padding."""

    @abstractmethod
    def choose(self) -> torch.Tensor:
        """Stored positions of the neurons chosen beside the base: int32 [K - base_count], ascending."""


class CoreNeurons(Evidence):
    """`core`: the neurons that most tokens mark as core neurons, as in the original (CoreInfer, arXiv 2410.18311)."""

    def begin(self, device: torch.device) -> None:
        self.counts = torch.zeros(self.plan.loaded_count, dtype=torch.int64, device=device)

    def observe(self, h: torch.Tensor) -> None:
        self.counts = kernels.core_counts(h, self.token_sparsity).add_(self.counts)

    def choose(self) -> torch.Tensor:
        return most_counted(self.counts, self.plan)


class _Sums(Evidence):
    """Evidence that is a sum over tokens."""

    def begin(self, device: torch.device) -> None:
        self.sums = torch.zeros(self.plan.loaded_count, dtype=torch.float32, device=device)

    def observe(self, h: torch.Tensor) -> None:
        self.sums = self._per_token(h.float()).sum(0).add_(self.sums)
        self.tokens += len(h)

    @abstractmethod
    def _per_token(self, h: torch.Tensor) -> torch.Tensor:
        """float32 [T, L]: what each token adds."""

    @abstractmethod
    def scores(self) -> torch.Tensor:
        """float32 [L], higher is better."""

    def choose(self) -> torch.Tensor:
        return best_scored(self.scores(), self.plan)


class Griffin(_Sums):
    """`griffin`: s_i = sqrt(sum_t (h_t,i / ||h_t||_2)^2), the statistic of GRIFFIN (arXiv 2404.01365)."""

    def _per_token(self, h: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(h, dim=1).square()

    def scores(self) -> torch.Tensor:
        return self.sums.sqrt()


class Blend(_Sums):
    """`blend`: s_i = ||W_down[:, i]|| (sum_t |h_t,i| + c m_i) / (T + c), m_i the neuron file's mean |h_i|.

    c = PRIOR_TOKENS, so the prior's weight falls as the prompt grows. Without a prior the prompt decides alone.
    """

    def _per_token(self, h: torch.Tensor) -> torch.Tensor:
        return h.abs()

    def scores(self) -> torch.Tensor:
        sums, weight = self.sums, self.tokens
        if self.prior.mean_abs is not None:
            sums, weight = sums + PRIOR_TOKENS * self.prior.mean_abs.to(sums.device), weight + PRIOR_TOKENS
        return self.prior.down_norm(self.down).to(sums.device) * sums / max(weight, 1)


class Glass(_Sums):
    """`glass`: rank fusion of local and global importance (GLASS, arXiv 2508.14302).

    The score is -(1 - w) times the rank by the prompt's mean |h_i| / ||h||_2 minus w times the place in the base
    ranking, w = GLOBAL_WEIGHT.
    """

    def _per_token(self, h: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(h, dim=1).abs()

    def scores(self) -> torch.Tensor:
        local = _places(self.sums)
        prior = _places(-self.plan.priority.to(self.sums))
        return -((1 - GLOBAL_WEIGHT) * local + GLOBAL_WEIGHT * prior)


class Similarity(_Sums):
    """`similarity`: the core neurons of similar texts (CoreInfer's similarity-guided way, arXiv 2410.18311).

    The prompt belongs to the cluster whose center has the largest cosine with sum_t h_t / ||h_t||_2. The score is how
    many of the cluster's texts have a neuron among their core neurons.
    """

    def _per_token(self, h: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(h, dim=1)

    def scores(self) -> torch.Tensor:
        centers = self.prior.clusters.centers.to(self.sums.device, torch.float32)
        nearest = torch.nn.functional.cosine_similarity(centers, self.sums[None], dim=1).argmax()
        return self.prior.clusters.counts[int(nearest)].to(self.sums.device, torch.float32)


def _places(values: torch.Tensor) -> torch.Tensor:
    """float32 [L]: 0 for the largest value, 1 for the next, …; equal values in order."""
    order = values.argsort(descending=True, stable=True)
    places = torch.empty_like(values, dtype=torch.float32)
    places[order] = torch.arange(len(values), dtype=torch.float32, device=values.device)
    return places


def most_counted(counts: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Stored positions of the neurons chosen beside the base: int32 [K - base_count], ascending.

    counts: int64 [L]. The largest counts win; equal counts (also 0, never marked) go by the base ranking, so the
    choice is unique and always complete.
    """
    priority = plan.priority.to(counts.device)
    return kernels.most_marked(counts, priority, plan.base_count, plan.computed_count - plan.base_count)


def best_scored(scores: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Stored positions of the best-scored neurons beside the base: int32 [K - base_count], ascending.

    scores: float [L], higher is better; equal scores go by the base ranking.
    """
    wanted = plan.computed_count - plan.base_count
    by_priority = plan.priority[plan.base_count :].argsort().to(scores.device) + plan.base_count
    ranked = by_priority[scores[by_priority].argsort(descending=True, stable=True)]
    return ranked[:wanted].sort().values.int()


EVIDENCE: dict[str, type[Evidence]] = {
    "core": CoreNeurons,
    "griffin": Griffin,
    "blend": Blend,
    "glass": Glass,
    "similarity": Similarity,
}
