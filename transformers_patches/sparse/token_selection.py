"""TokenSelection: a choice of neurons for every token, inside what is loaded.

One projection is read for all candidates, the other rows only for the best. With C candidates, of which K are kept:

`up`:   s_i = |up_i·x| a_i ||W_down[:, i]||, a_i = root mean square of act(gate_i·x)
`gate`: s_i = |act(gate_i·x)| u_i ||W_down[:, i]||, u_i = root mean square of up_i·x

The typical sizes a_i (u_i) are taken over the prompt's tokens, blended with those of the fit file, which weigh as much
as PRIOR_TOKENS tokens. Choosing by the gate is CATS' idea (arXiv 2404.08763) with an exact count instead of a
threshold; choosing by `up` was measured to be the better evidence (docs/quality.md). A plain FFN has one input
projection, and both mean |act(up_i·x)| ||W_down[:, i]||.

A token keeps its K best (`--token_count exact`), or all above a threshold of the layer (`average`, as CATS has it): the
one above which the last prompt tokens, and those of the fit file, had K neurons on average. Hard tokens may then read
more than easy ones.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from transformers_patches import kernels
from transformers_patches.modules.fast_linear import FEW_TOKENS
from transformers_patches.plan.load_plan import LayerPlan
from transformers_patches.sparse.neuron_rows import NeuronRows, Rows
from transformers_patches.sparse.prior import PRIOR_TOKENS, Prior
from transformers_patches.sparse.prompt_evidence import Blend
from transformers_patches.sparse.selection import Decoded, Selection, SequenceActivations

SAMPLE_TOKENS = 64  # prompt tokens that a threshold is taken from
MOST_SCORES = 65536  # scores of those tokens that are used
MIN_SAMPLE = 8  # with fewer, tokens keep their exact count


class TypicalSize:
    """Root mean square over a prompt's tokens of the projection that is not read for all candidates."""

    def __init__(self, prior: torch.Tensor | None, device: torch.device) -> None:
        """prior: float32 [L], the fit file's typical sizes, or None."""
        self.prior = None if prior is None else prior.to(device, torch.float32)
        self.sums: torch.Tensor | None = None  # of squares: float32 [L]
        self.tokens = 0

    def observe(self, values: torch.Tensor) -> None:
        """values: [T, L] of prompt tokens, no padding."""
        sums = kernels.sum_of_squares(values)
        self.sums = sums if self.sums is None else sums.add_(self.sums)
        self.tokens += len(values)

    def times(self, norms: torch.Tensor) -> torch.Tensor:
        """The sizes times norms: float32 [L] each.

        Without a prior, the mean over the neurons counts as one token, which keeps every neuron above 0.
        """
        weight = 1 if self.prior is None else PRIOR_TOKENS
        return kernels.typical_scale(self.sums, self.tokens, self.prior, weight, norms)


class ScoreSample:
    """A prompt's last tokens: the projection that is read for all candidates."""

    def __init__(self) -> None:
        self.values: torch.Tensor | None = None  # [n, L]

    def observe(self, values: torch.Tensor) -> None:
        """values: [T, L] of prompt tokens, no padding."""
        known = values if self.values is None else torch.cat([self.values, values])
        self.values = known[-SAMPLE_TOKENS:].clone()  # not a view of all tokens

    def threshold(self, scale: torch.Tensor, index: torch.Tensor | None, count: int) -> float | None:
        """Above which the tokens have `count` scores on average; None if there are too few tokens to tell.

        scale: float32 [L]; index: int [C], the candidates, None for all.
        """
        if self.values is None or len(self.values) < MIN_SAMPLE:
            return None
        values = self.values
        if index is not None:
            values, scale = values[:, index.long()], scale[index.long()]
        step = -(-values.numel() // MOST_SCORES)  # some of the neurons give the threshold as well as all
        part = values[:, ::step].float().abs() * scale[::step]
        return score_threshold(part, count * part.shape[1] / values.shape[1])


def score_threshold(scores: torch.Tensor, count: float) -> float:
    """Above which tokens have `count` scores on average. scores: float32 [T, C]."""
    kept, total = round(count * len(scores)), scores.numel()
    if kept >= total:
        return -1.0
    # halfway between the last that is kept and the first that is not, to be safe from rounding
    places = [total - kept - 1, min(total - kept, total - 1)]
    return float(np.partition(scores.flatten().cpu().numpy(), places)[places].mean())  # PyTorch would sort


class TokenSelection(Selection):
    """Decodes with neurons chosen for every token; the candidates of B sequences are each one's own.

    by: `up` or `gate`.
    average: keep all above a threshold instead of an exact count.

    Where the plan has fewer candidates than loaded neurons, a prompt chooses them, as selection `blend` does.
    """

    observes = True
    COLLECTED = ("sizes", "evidence", "samples", "_norms")

    def __init__(self, rows: NeuronRows, plan: LayerPlan, prior: Prior, by: str, *, average: bool = False) -> None:
        self.rows, self.plan, self.prior = rows, plan, prior
        self.by = by if rows.gated else "plain"
        self.average = average
        self.all_are_candidates = plan.candidate_count == plan.loaded_count
        self._candidate_plan = replace(plan, computed_count=plan.candidate_count)
        self.reset()

    def reset(self) -> None:
        self.sizes: list[TypicalSize] | None = None
        self.evidence: list[Blend] | None = None
        self.selected: list[torch.Tensor] | None = None  # candidates per sequence beside the base: int32
        self.scales: list[torch.Tensor] = []  # per sequence: float32 [L]
        self._norms: torch.Tensor | None = None  # of down's rows: float32 [L]
        self.samples: list[ScoreSample] | None = None
        self.thresholds: list[float | None] = []  # per sequence; None: the exact count
        self._gathered: dict[int, Rows] = {}
        self._active: list[kernels.ActiveNeurons] = []  # per sequence, for kernels.ffn

    @property
    def started(self) -> bool:
        return self.sizes is not None

    def begin(self, batch: int, device: torch.device) -> None:
        down = self.rows.weight("down")
        self._norms = self.prior.down_norm(down).to(device)
        prior = self.prior.gate_size if self.by == "up" else None
        self.sizes = [TypicalSize(prior, device) for _ in range(batch)]
        self.samples = [ScoreSample() for _ in range(batch)] if self.average else None
        if not self.all_are_candidates:
            plan = self._candidate_plan
            self.evidence = [Blend(plan, self.prior, down, device) for _ in range(batch)]

    def observe(self, sequence: int, activations: SequenceActivations) -> None:
        if self.by != "plain":
            self.sizes[sequence].observe(activations.first if self.by == "up" else activations.up)
        if self.samples is not None:
            self.samples[sequence].observe(activations.up if self.by == "up" else activations.first)
        if self.evidence is not None:
            self.evidence[sequence].observe(activations.h)

    def choose(self) -> None:
        """Choose candidates, and fix the scale and the threshold of their scores."""
        self._gathered = {}
        norms = self._norms
        self.scales = [norms if self.by == "plain" else size.times(norms) for size in self.sizes]
        if self.evidence is not None:
            self.selected = [evidence.choose() for evidence in self.evidence]
        sequences = range(len(self.scales))
        self.thresholds = [None if self.samples is None else self._threshold(sequence) for sequence in sequences]
        projections = self.rows.projections()
        self._active = [self._choice(projections, sequence) for sequence in sequences]

    def _choice(self, projections: kernels.Projections, sequence: int) -> kernels.ActiveNeurons:
        """A sequence's candidates and their sizes, and how many a token keeps."""
        prefix, index = self.plan.candidate_count, None
        if self.selected is not None:
            prefix, index = self.plan.base_count, self.selected[sequence]
        threshold = self.thresholds[sequence]
        kept = {"keep_count": self.plan.computed_count} if threshold is None else {"threshold": threshold}
        kept |= {"by_gate": self.by == "gate", "on_disk": self.rows.on_disk}
        return kernels.ActiveNeurons(projections, self.rows.activation, prefix, index, self.scales[sequence], **kept)

    def _threshold(self, sequence: int) -> float | None:
        """The geometric mean of the prompt's and the fit file's, which weighs as much as SAMPLE_TOKENS tokens."""
        scale, sample = self.scales[sequence], self.samples[sequence]
        index = self._candidate_index(sequence, scale.device)
        found, known = sample.threshold(scale, index, self.plan.computed_count), self.prior.threshold
        if found is None or known is None or min(found, known) <= 0:
            return found if known is None else known
        weight = SAMPLE_TOKENS / (SAMPLE_TOKENS + len(sample.values))
        return known**weight * found ** (1 - weight)

    def decode(self, x: torch.Tensor) -> Decoded:
        if not self._active:
            raise RuntimeError("decoding without a prefilled prompt: run the prompt over an empty cache first")
        self.rows.fetch()
        one = self._few if x.shape[1] <= FEW_TOKENS else self._many
        parts, kept = zip(*(one(sequence, part) for sequence, part in enumerate(x)), strict=True)
        y = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        computed, tokens = sum(kept), x.shape[0] * x.shape[1]
        return Decoded(y, computed, self.rows_read(computed) + (tokens - 1) * self.plan.candidate_count)

    def active_neurons(self, x: torch.Tensor) -> kernels.ActiveNeurons | None:
        return self._active[0] if len(self._active) == 1 else None

    def rows_read(self, computed: int) -> int:
        return self.plan.candidate_count + computed * (self.rows.matrices - 1)

    def _few(self, sequence: int, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Output [T, H] and neurons computed for one sequence's x [T, H]; a token reads only the rows that it needs."""
        y, computed = kernels.ffn(x, self._active[sequence])
        return y, int(computed.sum())

    def _many(self, sequence: int, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """As _few for many tokens, which together would read nearly all rows: the others' activations are set to 0."""
        rows, scale = self._candidates(sequence, x.device)
        values = self.rows.activations(x, rows)
        chosen_by = values.up if self.by == "up" else values.first
        scores, threshold = chosen_by.float().abs() * scale, self.thresholds[sequence]
        chosen = keep_best(scores, scores, self.plan.computed_count) > 0 if threshold is None else scores > threshold
        return self.rows.combine(values.h * chosen, rows), int(chosen.sum())

    def _candidates(self, sequence: int, device: torch.device) -> tuple[Rows, torch.Tensor]:
        """The candidates' rows and scales; rows of chosen candidates are gathered once per prompt."""
        index = self._candidate_index(sequence, device)
        if index is None:
            return self.rows.all(device), self.scales[sequence]
        if sequence not in self._gathered:
            self._gathered[sequence] = self.rows.gathered(index, device)
        return self._gathered[sequence], self.scales[sequence][index.long()]

    def _candidate_index(self, sequence: int, device: torch.device) -> torch.Tensor | None:
        """int32 [C], or None where every loaded neuron is a candidate."""
        if self.selected is None:
            return None
        base = torch.arange(self.plan.base_count, dtype=torch.int32, device=device)
        return torch.cat([base, self.selected[sequence]])


def keep_best(h: torch.Tensor, scores: torch.Tensor, kept: int) -> torch.Tensor:
    """h [..., n] with all but the `kept` best scores [..., n] of every token set to 0."""
    best = scores.topk(kept, dim=-1, sorted=False).indices
    return torch.zeros_like(h).scatter_(-1, best, h.gather(-1, best))
