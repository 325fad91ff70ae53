"""What neuron files and fit files share: safetensors with metadata, all of it checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from transformers_patches.errors import PartInferError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MOST_DIGITS = 18


def read_tensors(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file; PartInferError if it can't be read.

    kind: what the file should be.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # clone: a view would keep the whole file mapped
            return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118
    except Exception as error:  # the library's own, and PyTorch's for types that it does not know
        reason = " ".join(str(error).split())[:200]
        raise PartInferError(f"{path} is not a readable {kind} (truncated?): {reason}; make it again") from None


def check_floats(values: torch.Tensor, name: str, source: str) -> None:
    """Raise PartInferError unless a tensor holds floats, all of them finite."""
    if values.dtype not in FLOATS:
        raise PartInferError(f"{source}: {name} holds {values.dtype}, expected float32: make the file again")
    if values.numel() and not all(math.isfinite(end) for end in values.aminmax()):  # NaN is both ends
        raise PartInferError(f"{source}: {name} has values that are not finite: make the file again")


def whole_number(metadata: Mapping[str, str], key: str, source: str, default: int | None = None) -> int:
    """A count in the metadata; PartInferError if it is not a whole number, or is missing and has no default."""
    text = metadata.get(key)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise PartInferError(f"{source}: {key} is {_given(text)}, expected a whole number: make the file again")
    return int(text)


def fraction(value: object, key: str, source: str) -> float:
    """A number from 0 to 1, from text or JSON; PartInferError for anything else."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1:
        raise PartInferError(f"{source}: {key} is {_given(value)}, expected a number from 0 to 1: make the file again")
    return number


def shown(value: object) -> str:
    """A value as a message shows it, cut to a sensible length."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _given(value: object) -> str:
    return "missing" if value is None else shown(value)
