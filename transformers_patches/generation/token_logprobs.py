"""Log-probabilities of the tokens of an answer, taken while it is generated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, StoppingCriteria


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer, in nats, by the model's own distribution (temperature 1, nothing left out)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely tokens with their log-probabilities, best first


class TokenLogprobs(StoppingCriteria):
    """Records every token's log-probability. Never stops: a stopping criterion sees the token that was chosen.

    processor: has to see the logits before.
    """

    def __init__(self, top: int = 0) -> None:
        """top: how many of the most likely tokens are recorded beside the chosen one."""
        self.top, self.processor = top, _LastLogits()
        self.tokens: list[TokenLogprob] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_options) -> torch.Tensor:
        logits, token = self.processor.logits, int(input_ids[0, -1])
        total = float(logits.logsumexp(0))
        values, ids = logits.topk(min(self.top, len(logits))) if self.top else (logits[:0], logits[:0])
        top = tuple((int(i), float(v) - total) for i, v in zip(ids, values, strict=True))
        self.tokens.append(TokenLogprob(token, float(logits[token]) - total, top))
        return input_ids.new_zeros(1, dtype=torch.bool)


class _LastLogits(LogitsProcessor):
    """Keeps the logits, float32 [V], that the next token is chosen from. Changes nothing."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits = scores[0].float()
        return scores
