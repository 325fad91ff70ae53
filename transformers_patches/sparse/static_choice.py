"""StaticChoice: a choice of neurons at fixed places in memory, for a decode step that is recorded once and replayed."""

from __future__ import annotations

from dataclasses import replace

import torch

from transformers_patches import kernels
from transformers_patches.kernels import ActiveNeurons


class StaticChoice:
    """Computes an FFN over active neurons, on one device, without the processor learning what tokens choose.

    A recorded step reads the values that it finds in memory. So another choice of the same kind is copied to the same
    places, and the step need not be recorded again.

    computed: int64 [1], neurons computed since it was last set to 0.
    """

    def __init__(self, active: ActiveNeurons, device: torch.device) -> None:
        def own(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(device, copy=True)

        self.active = replace(
            active, index=own(active.index), size=own(active.size), added=[own(vector) for vector in active.added]
        )
        self.threshold = torch.full((1,), active.threshold, dtype=torch.float32, device=device)
        self.computed = torch.zeros(1, dtype=torch.int64, device=device)

    @staticmethod
    def kind(active: ActiveNeurons) -> tuple:
        """What the step depends on: choices of the same kind differ in values only."""
        listed = None if active.index is None else len(active.index)
        chosen = active.size is not None, active.keep_count, active.by_gate
        places = [weight.data_ptr() for weight in active.projections.weights]
        return (*places, active.prefix, listed, *chosen, active.activation, len(active.added))

    @staticmethod
    def fits(active: ActiveNeurons | None, x: torch.Tensor) -> bool:
        """Whether this can hold a choice: layers stored by input still count on the processor."""
        return active is not None and active.up is None and kernels.stays_on_device(x, active)

    def take(self, active: ActiveNeurons) -> None:
        """Another choice of the same kind."""
        own, new = ([choice.index, choice.size, *choice.added] for choice in (self.active, active))
        for place, values in zip(own, new, strict=True):
            if place is not None:
                place.copy_(values)
        self.threshold.fill_(active.threshold)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H]."""
        y, counts = kernels.ffn_on_device(x, self.active, self.threshold)
        self.computed += counts.sum()
        return y
