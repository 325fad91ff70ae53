"""How a decoder tells places of tokens apart: by turning queries and keys, or by something added to the embeddings."""

from __future__ import annotations

import torch
from torch import nn


class LearnedPositions:
    """Places of tokens as OPT knows them: an embedding that is added to the token's own; nothing is rotated."""

    def __init__(self, embedding: nn.Embedding) -> None:
        self.weight, self.offset = embedding.weight.detach(), embedding.offset

    def turns(self, x: torch.Tensor, position: int) -> tuple[None, None]:
        return None, None

    def embedding(self, position: int) -> torch.Tensor:
        """[H]; IndexError past the last position that the model knows."""
        return self.weight[position + self.offset]


class RotaryTable:
    """The rotary embedding's cosines and sines, kept for blocks of positions where they don't depend on the length."""

    STATIC = ("default", "linear", "llama3", "yarn")
    BLOCK = 256

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        self.static = getattr(rotary, "rope_type", None) in self.STATIC
        self.blocks: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def embedding(self, position: int) -> None:
        return None

    def turns(self, x: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, 1, D] each, of x's type."""
        if not self.static:
            return self.rotary(x, torch.tensor([[position]]))
        number, place = divmod(position, self.BLOCK)
        if (number, x.dtype) not in self.blocks:
            start = number * self.BLOCK
            self.blocks[number, x.dtype] = self.rotary(x, torch.arange(start, start + self.BLOCK)[None])
        return tuple(part[:, place : place + 1] for part in self.blocks[number, x.dtype])
