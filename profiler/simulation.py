"""The selection per token that decoding makes, applied to a whole calibration text in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from profiler.layerwise import Batch
from transformers_patches.sparse.prior import PRIOR_TOKENS
from transformers_patches.sparse.token_selection import TypicalSize, keep_best


@dataclass(frozen=True)
class Counts:
    """Numbers of neurons of one layer."""

    loaded: int  # in memory
    candidates: int  # a token chooses among these
    kept: int  # a token computes these
    base: int  # the first loaded neurons, which are always candidates

    @property
    def everything(self) -> bool:
        """Whether a token computes all loaded neurons."""
        return self.kept == self.loaded


class SimulatedSelection:
    """Sets activations to 0 that the selection per token (token_selection.py) would not compute.

    Prompt tokens stay as they are.

    kind: "up", "gate", or None to compute everything
    """

    def __init__(
        self,
        kind: str | None,
        counts: Counts,
        down: torch.Tensor,
        gate_size: torch.Tensor | None,
        mean_abs: torch.Tensor,
    ) -> None:
        """Of the loaded neurons:

        down: [L, H], their rows
        gate_size: float32 [L], the typical size of act(gate·x); None if the FFN is plain
        mean_abs: float32 [L], mean |h|, which counts beside the prompt's own when candidates are chosen
        """
        self.kind, self.counts, self.gate_size, self.mean_abs = kind, counts, gate_size, mean_abs
        self.down_norm = torch.linalg.vector_norm(down, dim=1, dtype=torch.float32)

    def with_rows(self, down: torch.Tensor) -> SimulatedSelection:
        """The same selection with other down rows."""
        return SimulatedSelection(self.kind, self.counts, down, self.gate_size, self.mean_abs)

    def apply(self, batch: Batch, h: torch.Tensor, up: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """h~ [B*T, L] of a batch. h, up, gate: [B*T, L], of the loaded neurons; gate is None if the FFN is plain."""
        if self.kind is None or self.counts.everything:
            return h
        result = h.clone()
        for decoded, scores in self.decoded_scores(batch, h, up, gate):
            result[decoded] = keep_best(h[decoded], scores, self.counts.kept)
        return result

    def decoded_scores(
        self, batch: Batch, h: torch.Tensor, up: torch.Tensor, gate: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each sequence with decoded tokens: their rows, int64 [T], and their scores, float32 [T, L].

        The score is negative where a neuron is not a candidate. Arguments as for `apply`.
        """
        sequences, length = batch.ids.shape
        for number in range(sequences):
            prompt, decoded = batch.prompt[number].nonzero().squeeze(1), batch.decoded[number].nonzero().squeeze(1)
            if not len(decoded):
                continue
            prompt, decoded = (number * length + place.to(h.device) for place in (prompt, decoded))
            scores = self._scores(prompt, decoded, h, up, gate)
            if self.counts.candidates < self.counts.loaded:
                scores[:, ~self._candidates(h[prompt])] = -1.0
            yield decoded, scores

    def _scores(
        self, prompt: torch.Tensor, decoded: torch.Tensor, h: torch.Tensor, up: torch.Tensor, gate: torch.Tensor | None
    ) -> torch.Tensor:
        """float32 [decoded tokens, L]."""
        if gate is None:
            return h[decoded].float().abs() * self.down_norm
        seen, typical = (up, gate) if self.kind == "up" else (gate, up)
        size = TypicalSize(self.gate_size if self.kind == "up" else None, h.device)
        size.observe(typical[prompt])
        return seen[decoded].float().abs() * size.times(self.down_norm)

    def _candidates(self, h: torch.Tensor) -> torch.Tensor:
        """bool [L]: the neurons that selection `blend` chooses for a prompt with activations h [T, L]."""
        scores = self.down_norm * (h.float().abs().sum(0) + PRIOR_TOKENS * self.mean_abs)
        scores[: self.counts.base] = torch.inf
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[scores.topk(self.counts.candidates).indices] = True
        return chosen
