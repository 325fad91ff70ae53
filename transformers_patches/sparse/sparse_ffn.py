"""SparseFFN: the FFN of one decoder layer over its loaded neurons. B batch, T tokens, H hidden, L loaded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.sparse.compensation import Compensation
from transformers_patches.sparse.neuron_rows import Activations, NeuronRows
from transformers_patches.sparse.request import PREFILL, Counters, RequestState
from transformers_patches.sparse.selection import Selection, SequenceActivations
from transformers_patches.sparse.static_choice import StaticChoice


class SparseFFN(nn.Module):
    """Computes every loaded neuron of a prompt's tokens, and of decoded tokens the neurons that a selection chooses.

    Takes and returns [B, T, H], or [B*T, H] as OPT has it. A prompt's activations are evidence for the selection.
    load/ffn_swap.py puts the parts together.
    """

    def __init__(
        self,
        rows: NeuronRows,
        selection: Selection,
        state: RequestState,
        *,
        output_bias: bool = False,
        compensation: Compensation | None = None,
    ) -> None:
        """selection: over the same rows.
        state: the model's; this becomes one of its layers.
        output_bias: whether the output projection has a bias.
        compensation: what stands in for neurons that are left out; may be set later.
        """
        super().__init__()
        self.rows, self.selection, self.state, self.compensation = rows, selection, state, compensation
        self.output_bias = nn.Parameter(torch.empty(rows.hidden_size), requires_grad=False) if output_bias else None
        self.static: StaticChoice | None = None  # while a step is being recorded: what it computes
        self.reset()
        self.reset_counters()
        state.layers.append(self)

    def reset(self) -> None:
        """Forget the request."""
        self.choice = object()  # replaced whenever decoding is about to compute something else
        self.selection.reset()

    def reset_counters(self) -> None:
        self.counters = Counters()

    @property
    def observes(self) -> bool:
        """Whether prompts decide what decoding computes."""
        return self.selection.observes

    def collected(self) -> dict[str, object]:
        """What the prompt has told so far."""
        return self.selection.collected()

    def resume(self, collected: dict[str, object]) -> None:
        """Go on from what another prompt with the same first tokens had told."""
        self.choice = object()
        self.selection.resume(collected)

    def select_by(self, selection: Selection) -> None:
        """Choose neurons in another way from now on. selection: over the same rows."""
        self.selection.reset()
        self.selection = selection
        self.reset()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.static is not None:
            return self._finished(self.static(x), prefill=False)
        shape = x.shape
        x = x.reshape(self.state.batch, self.state.tokens, shape[-1])
        prefill = self.state.phase == PREFILL
        y = self._prefill(x) if prefill else self._decode(x)
        return self._finished(y, prefill=prefill).reshape(shape)

    def _finished(self, y: torch.Tensor, *, prefill: bool) -> torch.Tensor:
        if self.compensation is not None:
            y = self.compensation.add(y, prefill=prefill)
        return y if self.output_bias is None else y + self.output_bias

    def _prefill(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.rows.all(x.device)
        values = self.rows.activations(x, rows)  # [B, T, L] each
        if self.selection.observes:
            if not self.selection.started:
                self.selection.begin(len(x), x.device)
            self.observe(values, self.state.token_mask)
        return self.rows.combine(values.h, rows)

    def observe(self, values: Activations, token_mask: torch.Tensor | None) -> None:
        """Take activations [B, T, L] as evidence, except where token_mask [B, T] is False; choose by all there is."""
        for sequence in range(len(values.h)):
            self.selection.observe(sequence, SequenceActivations(values, sequence, token_mask))
        self.selection.choose()
        self.choice = object()

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        result = self.selection.decode(x)
        self.counters.add(x.shape[0] * x.shape[1], result.computed, result.rows)
        return result.y

    def active_neurons(self, x: torch.Tensor) -> kernels.ActiveNeurons | None:
        """What one token of a single sequence computes, for the native decoder; None if it can't compute that.

        x: any hidden states [..., H], for their type.
        """
        active = self.selection.active_neurons(x)
        if active is None or not active.native:
            return None
        decoding = () if self.compensation is None else (self.compensation.bias_decode,)
        output = () if self.output_bias is None else (self.output_bias,)
        return replace(active, added=(*active.added, *decoding, *output))
