"""Experts: those of one mixture, stored by neuron. B sequences, T tokens of all of them, H hidden, k experts per token.

Sparse experts choose neurons for every decoded token, as selection `up` does (token_selection.py), each among its own.
The typical sizes that the choice needs are those of the prompt's tokens that the router sent to the expert. One that saw
fewer than LEAST_TOKENS of a prompt's tokens is computed whole.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.modules.fast_linear import FEW_TOKENS
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.sparse.prior import Prior
from transformers_patches.sparse.request import PREFILL, Counters, RequestState
from transformers_patches.sparse.token_selection import TypicalSize

LEAST_TOKENS = 4  # of a prompt, from which the typical sizes of an expert's neurons are known


class Experts(nn.Module):
    """Computes the experts that the model's own router chose, each over its tokens, as transformers' module does.

    Takes the place of that module. An expert reads its own rows only, in any weight format.
    """

    def __init__(
        self, experts: list[NeuronRows], used: int, state: RequestState | None = None, kept: int | None = None
    ) -> None:
        """used: k.
        state: the model's; this becomes one of its mixtures. None if the experts are not sparse.
        kept: how many neurons of an expert a decoded token computes.
        """
        super().__init__()
        self.rows, self.used, self.state, self.kept = nn.ModuleList(experts), used, state, kept
        self._norms = [Prior() for _ in experts]
        self._whole: dict[int, kernels.ActiveNeurons] = {}
        self.reset()
        self.reset_counters()
        if state is not None:
            state.experts.append(self)

    def reset(self) -> None:
        """Forget the request."""
        self._sizes: dict[tuple[int, int], TypicalSize] = {}  # by expert and sequence
        self._choices: dict[tuple[int, int], kernels.ActiveNeurons] = {}

    def collected(self) -> dict[tuple[int, int], TypicalSize]:
        """What the prompt has told so far."""
        return {place: copy.copy(size) for place, size in self._sizes.items()}

    def resume(self, collected: dict[tuple[int, int], TypicalSize]) -> None:
        """Go on from what another prompt with the same first tokens had told."""
        self.reset()
        self._sizes = {place: copy.copy(size) for place, size in collected.items()}

    def reset_counters(self) -> None:
        self.counters = Counters()

    @property
    def neurons(self) -> int:
        """How many neurons a token computes if nothing is left out."""
        return self.used * self.rows[0].count

    @property
    def row_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(rows.row_bytes for rows in self.rows)

    def read_share(self) -> float:
        """The share of those bytes that a decoded token has read on average; what a whole one reads if none was decoded."""
        whole = self.used / len(self.rows)
        if not self.counters.tokens:
            return whole
        return whole * self.counters.rows / (self.counters.tokens * self.neurons * self.rows[0].matrices)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], the numbers of the chosen experts [T, k], what their outputs count [T, k]; returns [T, H]."""
        y = torch.zeros_like(x)
        decodes = self.state is not None and self.state.phase != PREFILL
        compute = self._decoded if decodes else self._all_neurons
        for expert in sorted(set(chosen.flatten().tolist())):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            output = compute(expert, x[tokens], tokens)
            y.index_add_(0, tokens, (output * weights[tokens, places, None]).to(y.dtype))
        if decodes:
            self.counters.tokens += len(x)
        return y

    def _all_neurons(self, expert: int, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """An expert's output [n, H] for x [n, H], of these numbers among the pass's tokens."""
        rows = self.rows[expert]
        if self.state is None and rows.native_fits(x[None]):
            return kernels.ffn(x, self._all_of(expert))[0]
        every = rows.all(x.device)
        values = rows.activations(x, every)
        if self.state is not None:
            self._observe(expert, values.first, tokens)
        return rows.combine(values.h, every)

    def _observe(self, expert: int, gate: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take act(gate·x) [n, N] of prompt tokens as evidence, except for padding."""
        self._choices = {}
        mask = self.state.token_mask
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.flatten()[tokens]
        sequences = tokens // self.state.tokens
        for sequence in sequences[real].unique().tolist():
            size = self._sizes.setdefault((expert, sequence), TypicalSize(None, gate.device))
            size.observe(gate[real & (sequences == sequence)])

    def _decoded(self, expert: int, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """As _all_neurons, with those neurons that each token chooses."""
        y, sequences = torch.empty_like(x), tokens // self.state.tokens
        rows = self.rows[expert]
        for sequence in sequences.unique().tolist():
            active = self._choice(expert, sequence)
            for part in (sequences == sequence).nonzero().squeeze(1).split(FEW_TOKENS):
                y[part], computed = kernels.ffn(x[part], active)
                neurons, read = int(computed.sum()), len(part) if active.size is not None else 0
                # a token that chooses reads one projection of all neurons, and the others of those that it keeps
                both = read * rows.count + neurons * (rows.matrices - 1) if read else neurons * rows.matrices
                self.counters.add(0, neurons, both)
        return y

    def _all_of(self, expert: int) -> kernels.ActiveNeurons:
        if expert not in self._whole:
            rows = self.rows[expert]
            self._whole[expert] = kernels.ActiveNeurons(rows.projections(), rows.activation, rows.count)
        return self._whole[expert]

    def _choice(self, expert: int, sequence: int) -> kernels.ActiveNeurons:
        """What a token of a sequence chooses among; all of an expert that the prompt said too little about."""
        size = self._sizes.get((expert, sequence))
        if size is None or size.tokens < LEAST_TOKENS:
            return self._all_of(expert)
        if (expert, sequence) not in self._choices:
            rows = self.rows[expert]
            scale = size.times(self._norms[expert].down_norm(rows.weight("down")))
            self._choices[expert, sequence] = kernels.ActiveNeurons(
                rows.projections(), rows.activation, rows.count, size=scale, keep_count=self.kept
            )
        return self._choices[expert, sequence]
