"""What oneDNN keeps for every shape that it meets stays bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import torch
from transformers_patches import cli
{limit}
torch.set_num_threads(1)
weights = [torch.randn(32, 32, size, 3) for size in (1, 3, 5, 7)]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
for width in range(8, 408):  # convolutions: the one thing that oneDNN computes for PyTorch on every x86 processor
    for weight in weights:
        torch.nn.functional.conv2d(torch.randn(1, 32, 8, width), weight)
    if width == 8:
        before = resident()
print(resident() - before)
"""


def growth(limit: str) -> float:
    """Megabytes that a process grows by over 400 lengths."""
    environment = {name: value for name, value in os.environ.items() if "PRIMITIVE_CACHE" not in name}
    command = [sys.executable, "-c", CODE.format(limit=limit)]
    return float(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_every_length_also_if_torch_is_there_already():
    unlimited = growth("pass")
    if unlimited < 80:
        pytest.skip("PyTorch does not use oneDNN here")
    assert growth("cli.limit_primitives()") < 0.6 * unlimited


LENGTHS = """
import os, random
from transformers_patches import cli
cli.prepare_torch()
from transformers_patches.config import PartInferConfig
from transformers_patches.generation.generate import GenerationOptions, generate
from transformers_patches.load.loader import load_model
from transformers_patches.weights.model_files import load_tokenizer
folder, source = "models/SmolLM2-135M-Instruct", random.Random(0)
tokenizer, loaded = load_tokenizer(folder), load_model(folder, PartInferConfig(method="dense", device="cpu"))
for number, length in enumerate(source.sample(range(8, 318), 310)):
    prompt = [source.randrange(20, 40000) for _ in range(length)]
    generate(loaded, tokenizer, prompt, GenerationOptions(max_new_tokens=2))
    if number == 49:
        before = int(open("/proc/self/statm").read().split()[1])
print((int(open("/proc/self/statm").read().split()[1]) - before) * 4096 / 1e6)
"""


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_prompts_of_new_lengths_take_no_more_memory(demo_model):
    """310 lengths; what the first 50 of them take is left aside."""
    done = subprocess.run([sys.executable, "-c", LENGTHS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 50
