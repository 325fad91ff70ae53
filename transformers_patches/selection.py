"""Which of the loaded neurons a prompt needs: scores over its prefill activations -> active neurons."""

from __future__ import annotations

import torch

from transformers_patches import kernels
from transformers_patches.load_plan import LayerPlan


def core_neuron_counts(h: torch.Tensor, token_sparsity: float) -> torch.Tensor:
    """How many tokens mark each neuron as a core neuron: int64 [L] (CoreInfer, arXiv 2410.18311).

    h: [T, L], the activations of one sequence's prompt tokens, no padding. With P_t the positive activations of
    token t and k = floor(token_sparsity * mean_t P_t), every token marks its k largest positive activations.
    """
    tokens, loaded = h.shape
    counts = torch.zeros(loaded, dtype=torch.int64, device=h.device)
    if tokens == 0:
        return counts
    positives = int((h > 0).sum())
    k = min(int(token_sparsity * positives / tokens), loaded)
    if k == 0:
        return counts
    return kernels.core_counts(h, k)


def select_active(counts: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Stored positions of the neurons chosen beside the base: int64 [K - base_count], ascending.

    counts: int64 [L]. The largest counts win; equal counts (also 0, never marked) go by the base ranking, so the
    choice is unique and always complete.
    """
    wanted = plan.computed_count - plan.base_count
    priority = plan.priority.to(counts.device)
    key = counts * (int(plan.priority.max()) + 1) - priority
    chosen = key[plan.base_count :].topk(wanted, sorted=False).indices + plan.base_count
    return chosen.sort().values  # ascending positions read memory in order


def select_best(scores: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Stored positions of the best-scored neurons beside the base: int64 [K - base_count], ascending.

    scores: float [L], higher is better; equal scores go by the base ranking.
    """
    wanted = plan.computed_count - plan.base_count
    by_priority = plan.priority[plan.base_count :].argsort().to(scores.device) + plan.base_count
    ranked = by_priority[scores[by_priority].argsort(descending=True, stable=True)]
    return ranked[:wanted].sort().values
