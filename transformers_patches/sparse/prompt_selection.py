"""PromptSelection: one choice of neurons per prompt, the base neurons and those that its evidence speaks for."""

from __future__ import annotations

import torch

from transformers_patches import kernels
from transformers_patches.plan.load_plan import LayerPlan
from transformers_patches.sparse.compensation import PromptMean
from transformers_patches.sparse.neuron_rows import NeuronRows, Rows
from transformers_patches.sparse.prior import Prior
from transformers_patches.sparse.prompt_evidence import EVIDENCE, Evidence
from transformers_patches.sparse.selection import Decoded, Selection, SequenceActivations


class PromptSelection(Selection):
    """Decodes with neurons chosen once per prompt, B sequences each with its own."""

    COLLECTED = ("evidence", "means")

    def __init__(
        self,
        rows: NeuronRows,
        plan: LayerPlan,
        prior: Prior,
        evidence: str,
        *,
        token_sparsity: float,
        compensate: bool = False,
    ) -> None:
        """evidence: a name of config.PROMPT_SELECTIONS.
        compensate: whether loaded neurons that are not computed contribute their mean output, if the prior has means.
        """
        self.rows, self.plan, self.prior, self.kind = rows, plan, prior, EVIDENCE[evidence]
        self.token_sparsity = token_sparsity
        self.selects = plan.computed_count > plan.base_count  # whether a prompt chooses some of the neurons
        self.compensates = compensate and prior.mean is not None and plan.computed_count < plan.loaded_count
        self._base: Rows | None = None  # the base neurons never change
        self.reset()

    def reset(self) -> None:
        self.evidence: list[Evidence] | None = None
        self.means: list[PromptMean] | None = None
        self.selected: list[torch.Tensor] | None = None  # per sequence: int32 [K - base_count]
        self._gathered: dict[int, Rows] = {}
        self._active: list[kernels.ActiveNeurons] | None = None  # per sequence, for kernels.ffn

    @property
    def started(self) -> bool:
        return self.evidence is not None

    @property
    def observes(self) -> bool:
        return self.selects or self.compensates

    def begin(self, batch: int, device: torch.device) -> None:
        down = self.rows.weight("down")
        self.evidence = [self.kind(self.plan, self.prior, down, device, self.token_sparsity) for _ in range(batch)]
        if self.compensates:
            self.means = [PromptMean(self.prior.mean.to(device)) for _ in range(batch)]

    def observe(self, sequence: int, activations: SequenceActivations) -> None:
        self.evidence[sequence].observe(activations.h)
        if self.means is not None:
            self.means[sequence].observe(activations.h)

    def choose(self) -> None:
        self._gathered, self._active = {}, None
        self.selected = [evidence.choose() for evidence in self.evidence]

    def decode(self, x: torch.Tensor) -> Decoded:
        if self.observes and self.selected is None:
            raise RuntimeError("decoding without a prefilled prompt: run the prompt over an empty cache first")
        actives = self._actives(x)
        if self.rows.native_fits(x):
            parts = [kernels.ffn(part, active)[0] for part, active in zip(x, actives, strict=True)]
            y = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        else:
            y = self._gathered_outputs(x)
        neurons = sum(active.count for active in actives) * x.shape[1]
        return Decoded(y, neurons, self.rows_read(neurons))

    def active_neurons(self, x: torch.Tensor) -> kernels.ActiveNeurons | None:
        if self.observes and (self.selected is None or len(self.selected) != 1):
            return None
        return self._actives(x)[0]

    def rows_read(self, computed: int) -> int:
        return computed * self.rows.matrices

    def _actives(self, x: torch.Tensor) -> list[kernels.ActiveNeurons]:
        """The base neurons and each sequence's choice, put together once per prompt. x: [B, T, H], for its type."""
        if self._active is None:
            projections, count = self.rows.projections(), self.plan.base_count
            chosen = self.selected if self.selects else [None] * len(x)
            added = self._left_out_outputs(x) if self.compensates else [()] * len(x)
            self._active = [
                kernels.ActiveNeurons(projections, self.rows.activation, count, index, added=vectors)
                for index, vectors in zip(chosen, added, strict=True)
            ]
        return self._active

    def _left_out_outputs(self, x: torch.Tensor) -> list[tuple[torch.Tensor]]:
        """[H] for each sequence: what its loaded but not computed neurons write on average."""
        down = self.rows.weight("down").to(x.device)
        base = torch.arange(self.plan.base_count, device=x.device)
        computed = [torch.cat([base, index.to(x.device)]) for index in self.selected]
        return [(m.left_out(down, c, x.dtype),) for m, c in zip(self.means, computed, strict=True)]

    def _gathered_outputs(self, x: torch.Tensor) -> torch.Tensor:
        """The output, [B, T, H], for many tokens and on GPUs.

        Rows are gathered (and, with memory_limit, moved) once per prompt.
        """
        rows = self.rows
        base = self._base_rows(x.device)
        y = torch.zeros_like(x)
        if self.plan.base_count:
            y = rows.combine(rows.activations(x, base).h, base)
        if self.selects:
            chosen = [self._chosen_rows(sequence, x.device) for sequence in range(len(x))]
            pairs = zip(x, chosen, strict=True)
            y = y + torch.stack([rows.combine(rows.activations(part, some).h, some) for part, some in pairs])
        if self.compensates:
            y = y + torch.stack([active.added[0] for active in self._active])[:, None]
        return y

    def _base_rows(self, device: torch.device) -> Rows:
        """The base neurons; a copy on the GPU, kept, if the weights stay on the CPU."""
        if self._base is None or self._base["down"].device != device:
            self._base = self.rows.first(self.plan.base_count, device)
        return self._base

    def _chosen_rows(self, sequence: int, device: torch.device) -> Rows:
        """The neurons selected for a sequence, gathered once per prompt."""
        if sequence not in self._gathered:
            self._gathered[sequence] = self.rows.gathered(self.selected[sequence], device)
        return self._gathered[sequence]
