"""The operations that decode, as Triton kernels for GPUs. docs/gpu.md explains how they work.

Triton comes with the CUDA builds of PyTorch, and needs a C compiler for what starts its kernels. Nothing here imports
it before a tensor on a GPU needs it.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch


@cache
def why_not() -> str:
    """Why `available()` is False, or an empty string."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang", "cc"))):
        return "Triton needs a C compiler (gcc or clang)"
    return ""


def available() -> bool:
    """Whether Triton can be used, if there is a GPU."""
    return not why_not()


def computes_on(device: torch.device) -> bool:
    """Whether these kernels compute on a device."""
    return device.type == "cuda" and available()
