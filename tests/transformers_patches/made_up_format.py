"""A weight format that only PyTorch can read: what another one consists of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_patches.kernels import WeightFormat


@dataclass(frozen=True)
class OffsetFormat(WeightFormat):
    """Values from 0 to 15, a byte each, in groups of 16 columns; scales float32 [rows, groups, 2]: a factor and an offset."""

    def empty(self, rows: int, columns: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        scales = torch.empty(rows, columns // self.group, 2, device=device)
        return torch.empty(rows, columns, dtype=torch.uint8, device=device), scales

    def quantize(self, groups: Tensor, column_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        lowest, highest = groups.aminmax(dim=-1)
        scales = torch.stack(((highest - lowest).clamp(min=1e-6) / 15, lowest), dim=-1)
        return ((groups - scales[..., 1:]) / scales[..., :1]).round().to(torch.uint8).flatten(1), scales

    def unpack(self, data: Tensor, scales: Tensor) -> Tensor:
        return data.view(len(data), -1, self.group) * scales[..., :1] + scales[..., 1:]


MADE_UP = OffsetFormat("made_up", bits=4, group=16)
