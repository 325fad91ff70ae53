"""A bound on the process's memory: it is kept, and the answer is the same."""

import json
import re
import shutil
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


@pytest.mark.model
def test_without_a_pack_the_format_is_chosen_and_a_pack_is_made(demo_model, tmp_path):
    """A checkpoint that does not fit as it is fits in 8 bits; what does not fit at all is read from a pack of its own."""
    if not kernels.available():
        pytest.skip(f"no native kernels: {kernels.why_not()}")
    folder = tmp_path / "demo"
    shutil.copytree(demo_model, folder)
    asked = ["--checkpoint_path", str(folder), "--prompt", "Hi", "--num_tokens_to_generate", "4", "--context", "256"]

    def most(dtype: str) -> int:
        plan = command(*asked[:2], *asked[-2:], "--function", "plan", "--memory", "9G", "--dtype", dtype, "--json")
        return round(json.loads(plan.stdout)["settings"][0]["memory_mb"])

    between = (most("bfloat16") + most("int8")) // 2
    run = command(*asked, "--memory", f"{between}M", "--json")
    assert run.returncode == 0, run.stderr
    content = json.loads(run.stdout)
    assert content["settings"]["dtype"] == "int8"
    assert content["peak_memory_bytes"] <= between * 10**6
    refused = command(*asked, "--memory", "300M")
    assert refused.returncode == 1
    assert "--make_pack makes one beside the model" in refused.stderr
    small = f"{int(re.search(r'takes ([0-9]+) MB in int4', refused.stderr)[1]) - 10}M"
    for written in (True, False):
        run = command(*asked, "--memory", small, "--make_pack", "--json")
        assert run.returncode == 0, run.stderr
        assert ("writing" in run.stderr) == written
        assert json.loads(run.stdout)["resident_neurons_percent"] < 1
    (folder / "model.safetensors").touch()
    changed = command(*asked, "--memory", small, "--make_pack")
    assert changed.returncode == 1
    assert "is newer than the pack" in changed.stderr
