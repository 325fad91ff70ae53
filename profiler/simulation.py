"""What decoding computes of each calibration text: the selection per token, for prompt and decoded tokens in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from profiler.layerwise import Batch
from transformers_patches.sparse.prompt_evidence import PRIOR_TOKENS
from transformers_patches.sparse.token_selection import TypicalSize, keep_best


@dataclass(frozen=True)
class Counts:
    """Of one layer: neurons that are loaded, that a token chooses among, that it computes; the first `base` loaded ones
    are always candidates."""

    loaded: int
    candidates: int
    kept: int
    base: int

    @property
    def everything(self) -> bool:
        return self.kept == self.loaded


class SimulatedSelection:
    """Sets to 0 what the selection per token (token_selection.py) would not compute; prompt tokens stay as they are.

    kind: "up", "gate", or None where nothing is left out.
    """

    def __init__(
        self,
        kind: str | None,
        counts: Counts,
        down: torch.Tensor,
        gate_size: torch.Tensor | None,
        mean_abs: torch.Tensor,
    ) -> None:
        """down: [L, H], the loaded rows; gate_size: float32 [L], typical size of act(gate·x), None if the FFN is
        plain; mean_abs: float32 [L], mean |h|, which candidates go by beside the prompt's own."""
        self.kind, self.counts, self.gate_size, self.mean_abs = kind, counts, gate_size, mean_abs
        self.down_norm = torch.linalg.vector_norm(down, dim=1, dtype=torch.float32)

    def with_rows(self, down: torch.Tensor) -> SimulatedSelection:
        """The same for other down rows."""
        return SimulatedSelection(self.kind, self.counts, down, self.gate_size, self.mean_abs)

    def apply(self, batch: Batch, h: torch.Tensor, up: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """h~ [B*T, L] of a batch. h, up, gate: [B*T, L], of the loaded neurons; gate None if the FFN is plain."""
        if self.kind is None or self.counts.everything:
            return h
        result = h.clone()
        for decoded, scores in self.decoded_scores(batch, h, up, gate):
            result[decoded] = keep_best(h[decoded], scores, self.counts.kept)
        return result

    def decoded_scores(
        self, batch: Batch, h: torch.Tensor, up: torch.Tensor, gate: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each sequence that has decoded tokens, which rows these are, int64 [T], and their scores, float32 [T, L]:
        below 0 where a neuron is no candidate. Arguments as in `apply`."""
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
        """bool [L]: what selection `blend` chooses for a prompt with activations h [T, L]."""
        scores = self.down_norm * (h.float().abs().sum(0) + PRIOR_TOKENS * self.mean_abs)
        scores[: self.counts.base] = torch.inf
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[scores.topk(self.counts.candidates).indices] = True
        return chosen
