"""PromptSelection: one choice of neurons per prompt, the base neurons and those that its evidence speaks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from transformers_patches import kernels
from transformers_patches.sparse.compensation import PromptMean
from transformers_patches.sparse.prompt_evidence import EVIDENCE, Evidence

if TYPE_CHECKING:
    from transformers_patches.sparse.sparse_ffn import Rows, SparseFFN


@dataclass(frozen=True)
class Activations:
    """Of all loaded neurons at some tokens: [..., T, L] each.

    first: what the first input projection gives, act(gate·x), of a plain FFN act(up·x); up: up·x, None for a plain
    FFN; h: what enters the output projection.
    """

    first: torch.Tensor
    up: torch.Tensor | None
    h: torch.Tensor


class SequenceActivations:
    """Of all loaded neurons at one sequence's tokens, no padding: [T, L] each, as in Activations; cut out when asked for."""

    def __init__(self, values: Activations, sequence: int, token_mask: torch.Tensor | None) -> None:
        """values: [B, T, L] each; token_mask: bool [B, T], False where padding, or None."""
        self._values, self._sequence, self._mask = values, sequence, token_mask

    @cached_property
    def first(self) -> torch.Tensor:
        return self._cut(self._values.first)

    @cached_property
    def up(self) -> torch.Tensor:
        return self._cut(self._values.up)

    @cached_property
    def h(self) -> torch.Tensor:
        return self._cut(self._values.h)

    def _cut(self, part: torch.Tensor) -> torch.Tensor:
        tokens = part[self._sequence]
        return tokens if self._mask is None else tokens[self._mask[self._sequence]]


@dataclass(frozen=True)
class Decoded:
    """A decode pass: output like x, and, summed over its tokens, neurons computed and rows of weights read."""

    y: torch.Tensor
    computed: int
    rows: int


class PromptSelection:
    """Decodes with neurons chosen once per prompt, B sequences each with its own.

    mean: E[h] of the loaded neurons, float32 [L], if what the loaded but not computed ones write is to be added.
    """

    def __init__(self, ffn: SparseFFN, evidence: str, mean: torch.Tensor | None = None) -> None:
        self.ffn, self.kind, self.mean = ffn, EVIDENCE[evidence], mean
        self.reset()

    def reset(self) -> None:
        """Forget the request."""
        self.evidence: list[Evidence] | None = None
        self.means: list[PromptMean] | None = None
        self.selected: list[torch.Tensor] | None = None  # per sequence: int32 [K - base_count]
        self._gathered: dict[int, Rows] = {}
        self._left_out: torch.Tensor | None = None

    @property
    def started(self) -> bool:
        return self.evidence is not None

    @property
    def selects(self) -> bool:
        """Whether a prompt chooses some of the neurons."""
        return self.ffn.plan.computed_count > self.ffn.plan.base_count

    @property
    def observes(self) -> bool:
        return self.selects or self.compensates

    @property
    def compensates(self) -> bool:
        return self.mean is not None and self.ffn.plan.computed_count < self.ffn.plan.loaded_count

    def begin(self, batch: int, device: torch.device) -> None:
        """Evidence of `batch` sequences, none so far."""
        ffn = self.ffn
        down = ffn.weight("down")
        self.evidence = [self.kind(ffn.plan, ffn.prior, down, ffn.token_sparsity, device) for _ in range(batch)]
        if self.compensates:
            self.means = [PromptMean(self.mean.to(device)) for _ in range(batch)]

    def observe(self, sequence: int, activations: SequenceActivations) -> None:
        self.evidence[sequence].observe(activations.h)
        if self.means is not None:
            self.means[sequence].observe(activations.h)

    def choose(self) -> None:
        """Choose from what was observed so far."""
        self._gathered, self._left_out = {}, None
        self.selected = [evidence.choose() for evidence in self.evidence]

    def decode(self, x: torch.Tensor) -> Decoded:
        """x: [B, T, H]."""
        if self.observes and self.selected is None:
            raise RuntimeError("decoding without a prefilled prompt: run the prompt over an empty cache first")
        y, computed = self._native(x) if self.ffn.native_fits(x) else self._torch(x)
        if self.compensates:
            y = y + self._left_out_outputs(x)[:, None]
        neurons = sum(computed) * x.shape[1]
        return Decoded(y, neurons, self.rows_read(neurons))

    def active_neurons(self, x: torch.Tensor) -> kernels.ActiveNeurons | None:
        """Of a single sequence, for the native decoder; None if there are several, or nothing was chosen yet. x: any
        hidden states."""
        ffn = self.ffn
        if self.observes and (self.selected is None or len(self.selected) != 1):
            return None
        index = self.selected[0] if self.selects else None
        added = (self._left_out_outputs(x)[0],) if self.compensates else ()
        return kernels.ActiveNeurons(ffn.projections(), ffn.kernel_activation, ffn.plan.base_count, index, added=added)

    def rows_read(self, computed: int) -> int:
        """By tokens that compute so many neurons in all."""
        return computed * self.ffn.matrices

    def _left_out_outputs(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H]: what each sequence's loaded but not computed neurons write on average."""
        if self._left_out is None:
            down = self.ffn.weight("down").to(x.device)
            base = torch.arange(self.ffn.plan.base_count, device=x.device)
            computed = [torch.cat([base, index.to(x.device)]) for index in self.selected]
            pairs = zip(self.means, computed, strict=True)
            self._left_out = torch.stack([mean.left_out(down, active, x.dtype) for mean, active in pairs])
        return self._left_out

    def _native(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Output and computed neurons per sequence. The kernel takes the prefix and a list: nothing is gathered."""
        ffn = self.ffn
        base_count, parts, computed = ffn.plan.base_count, [], []
        weights = [ffn.weight(name) for name in ffn.weight_names]
        for sequence, part in enumerate(x):
            index = self.selected[sequence] if self.selects else None
            if ffn.gated:
                biases = {"bias_gate": ffn.gate_bias, "bias_up": ffn.up_bias} if ffn.input_bias else {}
                y = kernels.sparse_ffn(part, *weights, base_count, index, ffn.kernel_activation, **biases)
            else:
                bias = ffn.up_bias if ffn.input_bias else None
                up, down = weights
                y = kernels.sparse_ffn_plain(part, up, bias, down, base_count, index, ffn.kernel_activation)
            parts.append(y)
            computed.append(base_count + (0 if index is None else len(index)))
        return parts[0][None] if len(parts) == 1 else torch.stack(parts), computed

    def _torch(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Output and computed neurons per sequence."""
        ffn = self.ffn
        base = ffn.base_rows(x.device)
        y = torch.zeros_like(x)
        if ffn.plan.base_count:
            y = ffn.combine(ffn.activations(x, base).h, base)
        computed = [ffn.plan.base_count] * len(x)
        if self.selects:
            chosen = [self._rows(sequence, x.device) for sequence in range(len(x))]
            pairs = zip(x, chosen, strict=True)
            y = y + torch.stack([ffn.combine(ffn.activations(part, rows).h, rows) for part, rows in pairs])
            computed = [count + len(rows["down"]) for count, rows in zip(computed, chosen, strict=True)]
        return y, computed

    def _rows(self, sequence: int, device: torch.device) -> Rows:
        """The neurons selected for a sequence, gathered once per prompt."""
        if sequence not in self._gathered:
            self._gathered[sequence] = self.ffn.gathered_rows(self.selected[sequence], device)
        return self._gathered[sequence]
