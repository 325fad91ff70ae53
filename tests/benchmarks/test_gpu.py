"""benchmarks/gpu.py on a CPU with a tiny shape: everything but the numbers."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_one_line_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.cli.guarded(lambda: gpu.main([])) == 1
    assert capsys.readouterr().err == "error: this measures a GPU, and PyTorch sees none (docs/gpu.md)\n"


def test_every_subject_is_measured(tiny_checkpoints, tmp_path, capsys):
    shape, target = str(tiny_checkpoints["llama"]), tmp_path / "results.json"
    sizes = ["--prompt_tokens", "9", "--tokens", "3", "--rounds", "2", "--probe_bytes", "4096"]
    models = ["--models", shape, "no-such-shape"]
    assert gpu.main(["--device", "cpu", *models, *sizes, "--json", str(target)]) == 0
    results = json.loads(target.read_text(encoding="utf-8"))["results"]
    assert [(result["method"], result["dtype"]) for result in results] == [
        ("transformers, CUDA graph", "bfloat16"),
        ("transformers", "bfloat16"),
        ("partinfer", "bfloat16"),
        ("partinfer, exact count", "bfloat16"),
        ("partinfer", "int8"),
        ("partinfer", "int4"),
        ("dense", "int4"),
    ]
    assert [result["note"] for result in results] == [""] * 7
    baseline, _, sparse, *_, int4, dense4 = results
    assert baseline["speedup"] == baseline["byte_ratio"] == 1
    assert sparse["bytes_per_token"] < baseline["bytes_per_token"]
    assert int4["bytes_per_token"] < dense4["bytes_per_token"] < sparse["bytes_per_token"]
    printed = capsys.readouterr()
    assert "no-such-shape: left out, unknown shape" in printed.err
    assert "reached" in printed.out


def test_a_result_s_cells():
    result = gpu.Result("1b", "partinfer", "bfloat16", 10**9, 600.0, 1.2e12, None, 0.25, "")
    base = gpu.Result("1b", gpu.BASELINE, "bfloat16", 2 * 10**9, 400.0, 1.2e12, None, 0.25, "")
    result.compare(base)
    assert result.cells()[3:] == ("1.000", "600.0", "600", "50%", "1.50", "2.00", "75%", "-", "0.250")


def test_what_does_not_fit_into_the_time_is_left_out():
    clock = [0.0]
    budget = gpu.Budget(100, now=lambda: clock[0])
    assert budget.fits(10**10)
    clock[0] = 30
    budget.took(30, 10**9)
    assert budget.fits(2 * 10**9)
    assert not budget.fits(3 * 10**9)


def test_recorded_and_plain_decoding_give_the_same_tokens(tiny_checkpoints):
    config = gpu.shape_config(str(tiny_checkpoints["qwen2"]))
    settings = gpu.PartInferConfig(method="dense", kernels="torch", device="cpu", dtype="float32")
    loaded = gpu.load(config, settings, "tiny")
    recorded = []
    gpu.record_steps(loaded.model, loaded.state, lambda step: recorded.append(1) or step)
    prompt = torch.tensor([[5, 6, 7]])
    (_, _, ours), (_, _, plain) = (gpu.decode(loaded, prompt, 5, recorded=known) for known in (True, False))
    assert ours == plain
    assert len(recorded) == 1
