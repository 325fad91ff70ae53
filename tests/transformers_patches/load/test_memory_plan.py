"""A bound on the process's memory: it is kept, and the answer is the same."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from transformers_patches import kernels

ROOT = Path(__file__).resolve().parents[3]
PROMPT = "Why is the sky blue? " * 40  # products of that many tokens take memory, too


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "partinfer.py"), *flags], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.fixture(scope="module")
def pack(demo_model, tmp_path_factory) -> Path:
    """Of all neurons of the demo model."""
    if not kernels.available():
        pytest.skip(f"no native kernels: {kernels.why_not()}")
    folder, everything = (
        tmp_path_factory.mktemp("pack") / "demo",
        ["--loaded_neurons_percent", "1", "--sparsity", "0.7"],
    )
    made = command(
        *("--function", "pack", "--dtype", "int4", *everything, "--start_num", "0", "--end_num", "29"),
        *("--checkpoint_path", str(demo_model), "--output", str(folder)),
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.model
def test_a_bound_is_kept(pack):
    asked = ["--checkpoint_path", str(pack), "--prompt", PROMPT, "--num_tokens_to_generate", "8", "--context", "512"]
    refused = command(*asked, "--memory", "50M")
    assert refused.returncode == 1
    least = int(re.search(r"at least (\d+)M would do", refused.stderr)[1])
    run = command(*asked, "--memory", f"{least + 10}M", "--json")
    assert run.returncode == 0, run.stderr
    bounded = json.loads(run.stdout)
    assert bounded["peak_memory_bytes"] <= (least + 10) * 10**6
    assert 0 < bounded["resident_neurons_percent"] < 0.9
    free = json.loads(command(*asked, "--json").stdout)
    assert bounded["text"] == free["text"]
