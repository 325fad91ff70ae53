"""Clusters: groups of similar texts, and the neurons that matter to each of them (`python -m profiler cluster`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transformers_patches.errors import PartInferError
from transformers_patches.neurons.checks import WHOLE_NUMBERS, check_floats

MOST = 1024


@dataclass(frozen=True)
class Clusters:
    """C clusters.

    centers: float16 [C, layers, N], the mean over a cluster's texts of the mean of h / ||h||_2 over their tokens.
    counts: int32 [C, layers, N], how many of a cluster's texts have a neuron among their core neurons.
    """

    centers: torch.Tensor
    counts: torch.Tensor

    def check(self, shape: tuple[int, ...], source: str) -> None:
        """Raise PartInferError unless these are clusters of a ranking of this shape, [layers, N]."""
        check_floats(self.centers, "clusters.centers", source)
        whole = self.counts.dtype in WHOLE_NUMBERS and self.counts.numel() and int(self.counts.min()) >= 0
        fits = self.centers.shape == self.counts.shape and tuple(self.centers.shape[1:]) == tuple(shape)
        if not whole or not fits or not 0 < len(self.centers) <= MOST:
            raise PartInferError(f"{source}: its clusters are damaged, or of another model: make them again")

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"centers": self.centers.half(), "counts": self.counts.int()}

    @classmethod
    def read(cls, tensors: dict[str, torch.Tensor], source: str) -> Clusters | None:
        """The clusters in a file's tensors, None if it has none."""
        if not tensors:
            return None
        if tensors.keys() != {"centers", "counts"}:
            raise PartInferError(f"{source}: a part of its clusters is missing: make them again")
        return cls(tensors["centers"], tensors["counts"])
