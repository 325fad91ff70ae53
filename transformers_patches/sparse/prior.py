"""What is known about a layer's loaded neurons before a prompt comes."""

from __future__ import annotations

import copy

import torch

from transformers_patches import kernels
from transformers_patches.kernels import QuantizedTensor, Weight
from transformers_patches.neurons.clusters import Clusters
from transformers_patches.neurons.fit_file import LayerFit
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.load_plan import LayerPlan

PRIOR_TOKENS = 256  # what files say about activations weighs as much as a prompt of this many tokens
NORM_ROWS = 1024  # rows whose norms are taken at a time, so that float copies stay small


class Prior:
    """Statistics of the loaded neurons of one layer. What no file has is None.

    mean_abs: float32 [L], the mean of |h|.
    mean: float32 [L], the mean of h.
    gate_size: float32 [L], the root of the mean of act(gate)^2.
    threshold: the score above which a token computes a neuron.
    clusters: of texts, [C, L] each.
    """

    def __init__(
        self,
        mean_abs: torch.Tensor | None = None,
        mean: torch.Tensor | None = None,
        gate_size: torch.Tensor | None = None,
        threshold: float | None = None,
    ) -> None:
        self.mean_abs, self.mean, self.gate_size, self.threshold = mean_abs, mean, gate_size, threshold
        self.clusters: Clusters | None = None
        self._down_norm: torch.Tensor | None = None

    @classmethod
    def of(
        cls, plan: LayerPlan, layer: int, neurons: NeuronFile | None, fit: LayerFit | None, *, with_threshold: bool
    ) -> Prior:
        """The statistics of a neuron file and a fit, by storage position; its threshold only if asked for."""

        def pick(name: str) -> torch.Tensor | None:
            values = None if neurons is None else neurons.statistics.get(name)
            return None if values is None else values[layer][plan.neurons].float()

        size = None if fit is None or fit.gate_size is None else fit.gate_size.float()
        threshold = float(fit.threshold) if with_threshold and fit is not None and fit.threshold is not None else None
        return cls(pick("mean_abs"), pick("mean"), size, threshold)

    @classmethod
    def of_curve(cls, plan: LayerPlan, layer: int, neurons: NeuronFile, sparsity: float) -> Prior:
        """The statistics of a neuron file, and what its loss curve knows of reading `sparsity` of the FFN bytes."""
        curve, thresholds = neurons.loss, neurons.loss.thresholds_for(sparsity)
        threshold = None if thresholds is None else float(thresholds[layer])
        size = None if curve.gate_size is None else curve.gate_size[layer][plan.neurons].float()
        return cls.of(plan, layer, neurons, None, with_threshold=False).choosing(size, threshold)

    def choosing(self, gate_size: torch.Tensor | None, threshold: float | None) -> Prior:
        """The same with another typical size, and with a threshold if it is one (above 0)."""
        changed = copy.copy(self)
        changed.gate_size, changed.threshold = gate_size, threshold if threshold and threshold > 0 else None
        return changed

    def with_clusters(self, plan: LayerPlan, layer: int, clusters: Clusters) -> Prior:
        """The same with a file's clusters."""
        self.clusters = Clusters(*(t[:, layer][:, plan.neurons] for t in (clusters.centers, clusters.counts)))
        return self

    def with_norms_of(self, other: Prior) -> Prior:
        """The same, with ||W_down|| taken from a prior of the same neurons, where that has computed it."""
        self._down_norm = other._down_norm
        return self

    def down_norm(self, down: Weight) -> torch.Tensor:
        """||W_down[:, i]||_2 of the rows `down` [L, H]: float32 [L], computed once."""
        if self._down_norm is None:
            norms = []
            for start in range(0, len(down), NORM_ROWS):
                rows = down[start : start + NORM_ROWS]
                floats = kernels.dequantize(rows) if isinstance(rows, QuantizedTensor) else rows.float()
                norms.append(torch.linalg.vector_norm(floats, dim=1))
            self._down_norm = torch.cat(norms)
        return self._down_norm
