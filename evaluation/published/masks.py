"""What a decoded token leaves out of one product: its rule, applied by hooks, and counted.

A value that is left out is set to 0 and multiplied like any other, so that quality is exactly that of not reading its
row or column, and time is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from transformers_patches.sparse.request import DECODE, RequestState

Rule = Callable[[torch.Tensor], torch.Tensor]  # values [..., n] -> bool [..., n]: which of them count


def above(threshold: float) -> Rule:
    """Values whose size is above a threshold: CATS (arXiv 2404.08763) and TEAL (2408.14690)."""
    return lambda x: x.abs().float() > threshold


def largest(count: int, norm: torch.Tensor | None) -> Rule:
    """For every token the `count` inputs with the largest |x_j| norm_j: WINA (arXiv 2505.19427). norm: [n]; None: all 1."""

    def chosen(x: torch.Tensor) -> torch.Tensor:
        sizes = x.abs().float()
        best = (sizes if norm is None else sizes * norm).topk(count, dim=-1, sorted=False).indices
        return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, best, True)

    return chosen


class Mask:
    """A rule at one place of the model. It holds for decoded tokens, and where `forced` for all.

    size: bytes of the weights that are read only as far as values count
    in_ffn: whether these belong to the FFN
    """

    def __init__(self, state: RequestState, size: int, *, in_ffn: bool) -> None:
        self.size, self.in_ffn = size, in_ffn
        self.rule: Rule | None = None
        self.forced = False
        self._state = state
        self.reset_counters()

    def reset_counters(self) -> None:
        """Count from 0 again."""
        self.tokens = self.values = self.kept = 0

    @property
    def unread_bytes(self) -> float:
        """Bytes that a decoded token has left out on average; 0 if none was decoded."""
        return self.size * (1 - self.kept / self.values) if self.values else 0.0

    def on_input(self, module: nn.Module) -> None:
        """Leave out inputs of a projection."""
        module.register_forward_pre_hook(lambda _module, inputs: (self._masked(inputs[0]), *inputs[1:]))

    def on_output(self, module: nn.Module) -> None:
        """Leave out what an activation gives."""
        module.register_forward_hook(lambda _module, _inputs, output: self._masked(output))

    def _masked(self, x: torch.Tensor) -> torch.Tensor:
        if self.rule is None or not (self.forced or self._state.phase == DECODE):
            return x
        chosen = self.rule(x)
        if not self.forced:
            self.tokens += chosen[..., 0].numel()
            self.values += chosen.numel()
            self.kept += int(chosen.sum())
        return x * chosen


class MaskedReading:
    """All masks of a model, as LoadedModel counts them."""

    def __init__(self, masks: Sequence[Mask], ffn_bytes: int) -> None:
        """ffn_bytes: of the FFNs of all layers."""
        self.masks, self.ffn_bytes = masks, ffn_bytes

    def unread_bytes(self) -> float:
        """Bytes of weights that a decoded token has left out on average since the last reset."""
        return sum(mask.unread_bytes for mask in self.masks)

    def ffn_bytes_fraction(self) -> float:
        """Share of the FFNs' bytes that it has read."""
        return 1 - sum(mask.unread_bytes for mask in self.masks if mask.in_ffn) / self.ffn_bytes

    def decoded_tokens(self) -> int:
        """How many tokens that is."""
        return self.masks[0].tokens

    def reset_counters(self) -> None:
        """Count from 0 again."""
        for mask in self.masks:
            mask.reset_counters()
