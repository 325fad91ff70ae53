"""What kernels take, moved to another device."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from transformers_patches.kernels import ActiveNeurons, ByInput, Projections, QuantizedTensor


def moved(value, device: torch.device):
    """A tensor, a quantised weight, what consists of them, or a list of those, on a device; anything else as it is."""
    if isinstance(value, Tensor | QuantizedTensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(moved(part, device) for part in value)
    if isinstance(value, ActiveNeurons | ByInput | Projections):
        parts = {field.name: moved(getattr(value, field.name), device) for field in fields(value) if field.init}
        return replace(value, **parts)
    return value
