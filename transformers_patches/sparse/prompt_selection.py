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
        """evidence: a name of config.PROMPT_SELECTIONS. compensate: whether loaded neurons that are not computed get their
        mean output, if the prior has means."""
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
        self._left_out: torch.Tensor | None = None

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
        self._gathered, self._left_out = {}, None
        self.selected = [evidence.choose() for evidence in self.evidence]

    def decode(self, x: torch.Tensor) -> Decoded:
        if self.observes and self.selected is None:
            raise RuntimeError("decoding without a prefilled prompt: run the prompt over an empty cache first")
        y, computed = self._native(x) if self.rows.native_fits(x) else self._torch(x)
        if self.compensates:
            y = y + self._left_out_outputs(x)[:, None]
        neurons = sum(computed) * x.shape[1]
        return Decoded(y, neurons, self.rows_read(neurons))

    def active_neurons(self, x: torch.Tensor) -> kernels.ActiveNeurons | None:
        rows = self.rows
        if self.observes and (self.selected is None or len(self.selected) != 1):
            return None
        index = self.selected[0] if self.selects else None
        added = (self._left_out_outputs(x)[0],) if self.compensates else ()
        return kernels.ActiveNeurons(
            rows.projections(), rows.kernel_activation, self.plan.base_count, index, added=added
        )

    def rows_read(self, computed: int) -> int:
        return computed * self.rows.matrices

    def _left_out_outputs(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H]: what each sequence's loaded but not computed neurons write on average."""
        if self._left_out is None:
            down = self.rows.weight("down").to(x.device)
            base = torch.arange(self.plan.base_count, device=x.device)
            computed = [torch.cat([base, index.to(x.device)]) for index in self.selected]
            pairs = zip(self.means, computed, strict=True)
            self._left_out = torch.stack([mean.left_out(down, active, x.dtype) for mean, active in pairs])
        return self._left_out

    def _native(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Output and computed neurons per sequence. The kernel takes the prefix and a list: nothing is gathered."""
        rows = self.rows
        base_count, parts, computed = self.plan.base_count, [], []
        weights = [rows.weight(name) for name in rows.weight_names]
        for sequence, part in enumerate(x):
            index = self.selected[sequence] if self.selects else None
            if rows.gated:
                biases = {"bias_gate": rows.gate_bias, "bias_up": rows.up_bias} if rows.input_bias else {}
                y = kernels.sparse_ffn(part, *weights, base_count, index, rows.kernel_activation, **biases)
            else:
                bias = rows.up_bias if rows.input_bias else None
                up, down = weights
                y = kernels.sparse_ffn_plain(part, up, bias, down, base_count, index, rows.kernel_activation)
            parts.append(y)
            computed.append(base_count + (0 if index is None else len(index)))
        return parts[0][None] if len(parts) == 1 else torch.stack(parts), computed

    def _torch(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Output and computed neurons per sequence; rows are gathered (and, with memory_limit, moved) once per prompt."""
        rows, count = self.rows, self.plan.base_count
        base = self._base_rows(x.device)
        y = torch.zeros_like(x)
        if count:
            y = rows.combine(rows.activations(x, base).h, base)
        computed = [count] * len(x)
        if self.selects:
            chosen = [self._chosen_rows(sequence, x.device) for sequence in range(len(x))]
            pairs = zip(x, chosen, strict=True)
            y = y + torch.stack([rows.combine(rows.activations(part, some).h, some) for part, some in pairs])
            computed = [count + len(some["down"]) for some in chosen]
        return y, computed

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
