"""Aligned safetensors files: any reader of the format reads them."""

from __future__ import annotations

import torch
from safetensors import safe_open

from transformers_patches.weights.aligned_file import PADDING, save_aligned
from transformers_patches.weights.safetensors_folder import Checkpoint


def test_tensors_start_at_multiples_of_64_bytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randn(5, 3, generator=generator).to(torch.float16),
        "weight": torch.randn(7, 32, generator=generator).to(torch.bfloat16),
        "neurons": torch.randint(9, (5,), generator=generator, dtype=torch.int32),
        "data": torch.randint(-127, 127, (9, 64), generator=generator, dtype=torch.int8),
        "bytes": torch.randint(255, (3, 5), generator=generator).to(torch.uint8),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "sums": torch.randn(16, generator=generator),
    }
    path = tmp_path / "model.safetensors"
    save_aligned(tensors, path)
    with safe_open(path, framework="pt") as file:
        assert {name for name in file.keys() if not name.startswith(PADDING)} == set(tensors)  # noqa: SIM118
        for name, values in tensors.items():
            assert torch.equal(file.get_tensor(name), values)
    checkpoint = Checkpoint(tmp_path)
    for name in tensors:
        assert checkpoint._place(name).start % 64 == 0
