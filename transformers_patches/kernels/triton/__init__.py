"""The operations that decode, as Triton kernels for GPUs. docs/gpu.md explains how they work.

Triton comes with the CUDA builds of PyTorch. Nothing here imports it before a tensor on a GPU needs it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def why_not() -> str:
    """Why `available()` is False, or an empty string."""
    return "" if available() else "Triton is not installed"


def computes_on(device: torch.device) -> bool:
    """Whether these kernels compute on a device."""
    return device.type == "cuda" and available()
