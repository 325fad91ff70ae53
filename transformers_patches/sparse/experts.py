"""Experts: those of one mixture, stored by neuron. B sequences, T tokens of all of them, H hidden, k experts per token.

Sparse experts choose neurons for every decoded token, as selection `up` does (token_selection.py), each among its own.
The typical sizes that the choice needs are those of the prompt's tokens that the router sent to the expert. One that saw
fewer than LEAST_TOKENS of a prompt's tokens is computed whole. Of experts that are loaded in part, all this is about the
neurons that are there; the others count as 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.modules.fast_linear import FEW_TOKENS
from transformers_patches.sparse.neuron_rows import Activations, NeuronRows, Rows
from transformers_patches.sparse.prior import Prior
from transformers_patches.sparse.request import PREFILL, Counters, RequestState
from transformers_patches.sparse.token_selection import TypicalSize, keep_best
from transformers_patches.structure.activations import clamped

LEAST_TOKENS = 4  # of a prompt, from which the typical sizes of an expert's neurons are known
# Up to how many tokens an expert has, on average, one native call for each token of a pass takes less time than one for
# each expert (docs/models.md)
FEW_PER_EXPERT = 1.5


class Experts(nn.Module):
    """Computes the experts that the model's own router chose, each over its tokens, as transformers' module does.

    Takes the place of that module. An expert reads its own rows only, in any weight format. One token's experts are one
    call of the native kernels.

    Rows need not stay where they are: `before` is called with the numbers of the experts that a pass is about to read,
    so that they can be fetched; whoever gives an expert other memory (the parameters of `rows[number]`) says so with
    `moved`.
    """

    def __init__(
        self,
        experts: list[NeuronRows],
        used: int,
        state: RequestState | None = None,
        kept: int | None = None,
        *,
        native_activation: str | None = None,
        interleaved: bool = False,
        size: int | None = None,
    ) -> None:
        """experts: the loaded neurons of each; they may have different numbers of them.
        used: k.
        state: the model's; this becomes one of its mixtures. None if the experts are not sparse.
        kept: how many neurons of an expert a decoded token computes.
        native_activation: what the native kernels call it; None: PyTorch computes.
        interleaved: they are gpt-oss's, with biases and bounds (`structure/activations.py`); the biases of gate and up
            take turns, as they are stored.
        size: N, the neurons of a whole expert; None: that of the first.
        """
        super().__init__()
        self.rows, self.used, self.state, self.kept = nn.ModuleList(experts), used, state, kept
        self.native_activation, self.interleaved = native_activation, interleaved
        self.size = experts[0].count if size is None else size
        if interleaved:
            size, hidden = experts[0].count, experts[0].hidden_size
            self.gate_up_bias = nn.Parameter(torch.empty(len(experts), 2 * size), requires_grad=False)
            self.down_bias = nn.Parameter(torch.empty(len(experts), hidden), requires_grad=False)
        self.before: Callable[[list[int]], None] | None = None
        self._norms = [Prior() for _ in experts]
        self._table: kernels.ExpertTable | None = None
        self._set: set[int] = set()  # experts whose rows the table knows
        self._whole: dict[int, kernels.ActiveNeurons] = {}
        self.reset()
        self.reset_counters()
        if state is not None:
            state.experts.append(self)

    def reset(self) -> None:
        """Forget the request."""
        self._sizes: dict[tuple[int, int], TypicalSize] = {}  # by expert and sequence
        self._forget_choices()

    def _forget_choices(self) -> None:
        self._scales: dict[tuple[int, int], torch.Tensor] = {}  # the same times the norms of down: float32 [N]
        self._choices: dict[tuple[int, int], kernels.ActiveNeurons] = {}
        self._sized: dict[int, int] = {}  # of which sequence the table has an expert's sizes

    def moved(self, expert: int) -> None:
        """An expert's rows lie elsewhere now."""
        self._set.discard(expert)
        self._whole.pop(expert, None)
        self._choices = {place: choice for place, choice in self._choices.items() if place[0] != expert}

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
        return self.used * self.size

    @property
    def row_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(rows.row_bytes for rows in self.rows)

    def read_share(self) -> float:
        """The share of those bytes that a decoded token has read on average; what a whole one reads if none was decoded."""
        if not self.counters.tokens:
            return self.used / len(self.rows)
        stored = sum(rows.count for rows in self.rows) * self.rows[0].matrices
        return self.counters.rows / (self.counters.tokens * stored)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], the numbers of the chosen experts [T, k], what their outputs count [T, k]; returns [T, H]."""
        decodes = self.state is not None and self.state.phase != PREFILL
        in_one_call = self.native_activation is not None and (decodes or self.state is None)
        if len(x) == 1 and in_one_call:
            self._fetch(chosen.flatten().tolist())
            return self._one_token(x, chosen, weights, 0, decodes=decodes)
        order = chosen.flatten().argsort(stable=True)  # of all T k uses, those of one expert after the other
        found, counts = chosen.flatten()[order].unique_consecutive(return_counts=True)
        numbers, counts = found.tolist(), counts.tolist()
        self._fetch(numbers)
        if in_one_call and len(order) <= FEW_PER_EXPERT * len(numbers):
            return torch.cat([self._one_token(x, chosen, weights, t, decodes=decodes) for t in range(len(x))])
        tokens, compute = order // chosen.shape[1], self._decoded if decodes else self._all_neurons
        inputs, outputs = x[tokens], []
        for expert, part, own in zip(numbers, inputs.split(counts), tokens.split(counts), strict=True):
            outputs.append(compute(expert, part, own))
        if decodes:
            self.counters.tokens += len(x)
        weighted = torch.cat(outputs) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, tokens, weighted.to(x.dtype))

    def _fetch(self, numbers: list[int]) -> None:
        if self.before is not None:
            self.before(numbers)

    def _one_token(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, token: int, *, decodes: bool
    ) -> torch.Tensor:
        """All experts of one of the tokens in one call: [1, H]."""
        numbers = chosen[token].tolist()
        for expert in numbers:
            if expert not in self._set:
                self._put_into_table(expert)
        if decodes:
            self._set_sizes(numbers, token // self.state.tokens)
        y, computed = self._table.run(x[token : token + 1], chosen[token], weights[token], self.kept or 0)
        if decodes:  # up is read for all neurons, gate and down for those that are kept
            self.counters.add(1, computed, sum(self.rows[expert].count for expert in numbers) + 2 * computed)
        return y

    def _set_sizes(self, experts: list[int], sequence: int) -> None:
        """Let the table know what a sequence's prompt said about some experts."""
        for expert in experts:
            if self._sized.get(expert) != sequence:
                self._table.set_size(expert, self._scale(expert, sequence))
                self._sized[expert] = sequence

    def _put_into_table(self, expert: int) -> None:
        rows = self.rows[expert]
        projections = rows.projections()
        if self._table is None:
            shape = (len(self.rows), max(each.count for each in self.rows), rows.hidden_size)
            self._table = kernels.ExpertTable(*shape, self.native_activation, projections.native_code)
        biases = self._biases(expert)
        self._table.set(expert, projections, *(() if biases is None else (biases[:2], biases[2].float())))
        self._set.add(expert)

    def _biases(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Of gate, up and down."""
        if not self.interleaved:
            return None
        both = self.gate_up_bias[expert].detach()
        return both[::2].contiguous(), both[1::2].contiguous(), self.down_bias[expert].detach()

    def _activations(self, expert: int, x: torch.Tensor, rows: Rows) -> Activations:
        """Of all neurons of an expert, from x [n, H]."""
        if not self.interleaved:
            return self.rows[expert].activations(x, rows)
        gate_bias, up_bias, _ = self._biases(expert)
        project = self.rows[expert].project
        gate, up = clamped(project(x, rows, "gate") + gate_bias, project(x, rows, "up") + up_bias)
        return Activations(gate, up, gate * up)

    def _output(self, expert: int, h: torch.Tensor, rows: Rows) -> torch.Tensor:
        y = self.rows[expert].combine(h, rows)
        return y + self._biases(expert)[2] if self.interleaved else y

    def _all_neurons(self, expert: int, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """An expert's output [n, H] for x [n, H], of these numbers among the pass's tokens."""
        rows = self.rows[expert]
        if self.state is None and not self.interleaved and rows.native_fits(x[None]):
            return kernels.ffn(x, self._all_of(expert))[0]
        every = rows.all(x.device)
        values = self._activations(expert, x, every)
        if self.state is not None:
            self._observe(expert, values.first, tokens)
        return self._output(expert, values.h, every)

    def _observe(self, expert: int, gate: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take act(gate·x) [n, N] of prompt tokens as evidence, except for padding."""
        self._forget_choices()
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
            chooses = self._scale(expert, sequence) is not None
            for part in (sequences == sequence).nonzero().squeeze(1).split(FEW_TOKENS):
                y[part], neurons = self._some_neurons(expert, sequence, x[part])
                # a token that chooses reads one projection of all neurons, and the others of those that it keeps
                one = len(part) * rows.count if chooses else neurons
                self.counters.add(0, neurons, one + neurons * (rows.matrices - 1))
        return y

    def _some_neurons(self, expert: int, sequence: int, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The output for a few tokens of one sequence, and how many neurons were computed for them."""
        if not self.interleaved:
            y, computed = kernels.ffn(x, self._choice(expert, sequence))
            return y, int(computed.sum())
        rows, scale = self.rows[expert].all(x.device), self._scale(expert, sequence)
        values = self._activations(expert, x, rows)
        if scale is None:
            return self._output(expert, values.h, rows), values.h.numel()
        h = keep_best(values.h, values.up.float().abs() * scale, self.kept)
        return self._output(expert, h, rows), self.kept * len(x)

    def _all_of(self, expert: int) -> kernels.ActiveNeurons:
        if expert not in self._whole:
            rows = self.rows[expert]
            self._whole[expert] = kernels.ActiveNeurons(rows.projections(), rows.activation, rows.count)
        return self._whole[expert]

    def _scale(self, expert: int, sequence: int) -> torch.Tensor | None:
        """The typical sizes of an expert's neurons times the norms of down: float32 [N].

        None: the prompt said too little, or no more neurons are loaded than a token computes.
        """
        place = expert, sequence
        size = self._sizes.get(place)
        if size is None or size.tokens < LEAST_TOKENS or self.rows[expert].count <= (self.kept or 0):
            return None
        if place not in self._scales:
            self._scales[place] = size.times(self._norms[expert].down_norm(self.rows[expert].weight("down")))
        return self._scales[place]

    def _choice(self, expert: int, sequence: int) -> kernels.ActiveNeurons:
        """What a token of a sequence chooses among; all of an expert that the prompt said too little about."""
        scale = self._scale(expert, sequence)
        if scale is None:
            return self._all_of(expert)
        if (expert, sequence) not in self._choices:
            rows = self.rows[expert]
            self._choices[expert, sequence] = kernels.ActiveNeurons(
                rows.projections(), rows.activation, rows.count, size=scale, keep_count=self.kept
            )
        return self._choices[expert, sequence]
