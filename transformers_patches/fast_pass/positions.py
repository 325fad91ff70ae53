"""How a decoder knows the positions of tokens: rotary embeddings, or learned ones that are added to the input."""

from __future__ import annotations

import torch
from torch import nn

Rope = tuple[torch.Tensor, torch.Tensor] | tuple[None, None]  # cosines and sines of a position, [1, 1, D] each


class LearnedPositions:
    """OPT's positions: a learned embedding is added to the token's own; queries and keys are not rotated."""

    def __init__(self, embedding: nn.Embedding) -> None:
        self.weight, self.offset = embedding.weight.detach(), embedding.offset

    def rope(self, x: torch.Tensor, position: int) -> Rope:
        return None, None

    def embedding(self, position: int) -> torch.Tensor:
        """[H]. Raises IndexError past the model's last position."""
        return self.weight[position + self.offset]


class RotaryTable:
    """The rotary embedding's cosines and sines, in blocks of positions where they don't depend on the length."""

    STATIC = ("default", "linear", "llama3", "yarn")
    BLOCK = 256

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        self.static = getattr(rotary, "rope_type", None) in self.STATIC
        self.blocks: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def embedding(self, position: int) -> None:
        return None

    def rope(self, x: torch.Tensor, position: int) -> Rope:
        """Cosines and sines, [1, 1, D] each, of x's type."""
        if not self.static:
            return self.rotary(x, torch.tensor([[position]]))
        number, offset = divmod(position, self.BLOCK)
        if (number, x.dtype) not in self.blocks:
            start = number * self.BLOCK
            self.blocks[number, x.dtype] = self.rotary(x, torch.arange(start, start + self.BLOCK)[None])
        return tuple(part[:, offset : offset + 1] for part in self.blocks[number, x.dtype])
