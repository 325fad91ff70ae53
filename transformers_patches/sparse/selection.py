"""The neurons that a prompt's evidence speaks for: counts or scores of the loaded neurons -> active neurons."""

from __future__ import annotations

import torch

from transformers_patches import kernels
from transformers_patches.plan.load_plan import LayerPlan


def select_active(counts: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Stored positions of the neurons chosen beside the base: int32 [K - base_count], ascending.

    counts: int64 [L]. The largest counts win; equal counts (also 0, never marked) go by the base ranking, so the
    choice is unique and always complete.
    """
    priority = plan.priority.to(counts.device)
    return kernels.most_marked(counts, priority, plan.base_count, plan.computed_count - plan.base_count)


def select_best(scores: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Stored positions of the best-scored neurons beside the base: int32 [K - base_count], ascending.

    scores: float [L], higher is better; equal scores go by the base ranking.
    """
    wanted = plan.computed_count - plan.base_count
    by_priority = plan.priority[plan.base_count :].argsort().to(scores.device) + plan.base_count
    ranked = by_priority[scores[by_priority].argsort(descending=True, stable=True)]
    return ranked[:wanted].sort().values.int()
