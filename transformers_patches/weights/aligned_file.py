"""Writing safetensors files whose tensors can be used where the file is mapped: they start at multiples of 64 bytes.

The format is a length, a JSON header that may end in spaces, and the bytes of all tensors without gaps. So padding is a
tensor of its own. The writer of the safetensors package orders tensors by type and name, and does not align them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from transformers_patches.weights.mapped_files import ALIGNMENT
from transformers_patches.weights.safetensors_folder import DTYPES

PADDING = "padding."  # prefix of the names of padding tensors
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_aligned(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write contiguous CPU tensors in the given order, and sync the file."""
    ordered = []
    for name, values in tensors.items():
        ordered.append((name, values))
        if gap := -values.nbytes % ALIGNMENT:
            ordered.append((f"{PADDING}{len(ordered)}", torch.zeros(gap, dtype=torch.uint8)))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in ordered:
        start, end = end, end + values.nbytes
        header[name] = {"dtype": _NAMES[values.dtype], "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, values in ordered:
            if values.nbytes:
                file.write(values.reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
