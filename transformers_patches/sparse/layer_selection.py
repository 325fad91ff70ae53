"""LayerSelection: neurons by `up` for every token, where up itself is read by input and small rows of down are left out.

A token reads the inputs of up that matter, chooses neurons by the up that this gives, reads their rows of gate, and of
the rows of down only those whose activation is not small: |h_i| ||W_down[:, i]|| above a threshold. Gates close many of
the neurons that up has chosen, and that is known before down is read.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from transformers_patches import kernels
from transformers_patches.neurons.byte_ladder import LayerChoice
from transformers_patches.plan.load_plan import LayerPlan
from transformers_patches.sparse.by_input_linear import product_of_inputs, product_with_mean
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.sparse.prior import Prior
from transformers_patches.sparse.selection import Decoded
from transformers_patches.sparse.token_selection import TokenSelection, keep_best


class LayerSelection(TokenSelection):
    """Over rows whose up is stored by input; all neurons must be loaded."""

    def __init__(self, rows: NeuronRows, plan: LayerPlan, prior: Prior, choice: LayerChoice) -> None:
        """prior: its threshold is replaced by the choice's."""
        super().__init__(rows, plan, prior, "up", average=True)
        self._constant: tuple[torch.Tensor, torch.Tensor] | None = None  # a mean, and its product with up
        self.set_choice(choice)

    def set_choice(self, choice: LayerChoice) -> None:
        """What tokens read from now on; what a prompt has shown so far is kept."""
        self.choice = choice
        count = max(1, round(choice.neurons * self.plan.loaded_count))
        self.plan = replace(self.plan, computed_count=min(count, self.plan.loaded_count))
        self.prior = self.prior.choosing(self.prior.gate_size, choice.neuron_threshold)
        if self.started:
            self.choose()

    def _choice(self, projections: kernels.Projections, sequence: int) -> kernels.ActiveNeurons:
        active = super()._choice(projections, sequence)
        size = None if self.choice.down_threshold < 0 else self._norms
        return replace(active, up=self._up(), down_size=size, down_threshold=self.choice.down_threshold)

    def _up(self) -> kernels.ByInput:
        chosen, weight = self.choice.inputs["ffn"], self.rows.weight("up")
        if self._constant is None or not torch.equal(self._constant[0], chosen.mean):
            self._constant = chosen.mean, product_with_mean(chosen.mean, weight, None)
        return kernels.ByInput(weight, chosen.mean, chosen.norm, self._constant[1], chosen.threshold)

    def decode(self, x: torch.Tensor) -> Decoded:
        """By PyTorch, which computes everything and drops what is not chosen; the native decoder doesn't read that."""
        if not self._active:
            raise RuntimeError("decoding without a prefilled prompt: run the prompt over an empty cache first")
        parts, computed, rows = [], 0, 0
        for sequence, part in enumerate(x):
            y, inputs, neurons, down = self._masked(sequence, part)
            parts.append(y)
            computed += neurons
            rows += self.rows_of(inputs, neurons, down)
        return Decoded(torch.stack(parts), computed, rows)

    def _masked(self, sequence: int, x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
        """Output [T, H] for one sequence's x [T, H], inputs of up, neurons and rows of down that its tokens read."""
        active, rows = self._active[sequence], self.rows.all(x.device)
        up, inputs = product_of_inputs(x, active.up, native=False)
        scores = up.float().abs() * active.size.to(x.device)
        if active.keep_count is not None:
            chosen = keep_best(scores, scores, active.keep_count) > 0
        else:
            chosen = scores > active.threshold
        h = self.rows.act_fn(self.rows.project(x, rows, "gate")) * up * chosen
        neurons = down = int(chosen.sum())
        if active.down_size is not None:
            kept = h.float().abs() * active.down_size.to(x.device) > active.down_threshold
            h, down = h * kept, int(kept.sum())
        return self.rows.combine(h, rows), inputs, neurons, down

    def rows_of(self, inputs: int, neurons: int, down: int) -> int:
        """Rows of weights that make up what was read: inputs of up, neurons, rows of down."""
        return round(inputs * self.plan.loaded_count / self.rows.hidden_size) + neurons + down
