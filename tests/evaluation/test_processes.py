"""Two processes give what one gives."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from evaluation.perplexity import method_logits, score_examples, together
from evaluation.processes import merged_counts
from evaluation.windows import Example
from tests.conftest import ROOT
from tests.evaluation.conftest import SETTINGS
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def run(command: list[str], *, processes: int) -> subprocess.CompletedProcess:
    start = LAUNCH if processes == 2 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*start, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture
def given(model_folder, ranking_paths) -> list[str]:
    named = {"model_name": model_folder, "device": "cpu", "threads": 1, "bootstrap_iters": 20}
    return [f"--{name}={value}" for name, value in (named | SETTINGS | ranking_paths).items()]


@pytest.mark.slow
def test_perplexities_of_two_processes_are_those_of_one_to_the_bit(given, text_file, tmp_path):
    command = ["evaluation/evaluate_perplexity.py", *given, f"--dataset={text_file}", "--method=dense,partinfer"]
    command += ["--prefill_tokens=24", "--scored_tokens=8", "--limit=7", "--batch_size=2"]
    for processes in (1, 2):
        done = run([*command, f"--json={tmp_path / f'{processes}.json'}"], processes=processes)
        assert done.stdout.count("| partinfer |") == 1  # one of them reports
    one, two = (json.loads((tmp_path / f"{n}.json").read_text(encoding="utf-8")) for n in (1, 2))
    assert one["rows"][1]["examples"] == 7
    assert two == one


@pytest.mark.slow
def test_scores_of_two_processes_are_those_of_one(given, data_folder, tmp_path):
    command = ["evaluation/evaluate_task.py", *given, f"--data_dir={data_folder}", "--method=partinfer"]
    command += ["--task_name=local_piqa,local_triviaqa", "--log_samples"]
    for processes in (1, 2):
        run([*command, f"--output_path={tmp_path / str(processes)}"], processes=processes)
    for task in ("local_piqa", "local_triviaqa"):
        one, two = (
            json.loads((tmp_path / n / "tiny-llama" / "partinfer" / f"{task}.json").read_text(encoding="utf-8"))
            for n in "12"
        )
        assert one["metrics"] == two["metrics"]
        assert one["rows"] == two["rows"] == {task: 4}
        assert one["weights"] == two["weights"]
        samples = tmp_path / "2" / "tiny-llama" / "partinfer" / f"{task}.samples.jsonl"
        assert len(samples.read_text(encoding="utf-8").strip().split("\n")) == 4
    assert not list(tmp_path.rglob("*.answers.jsonl"))


@pytest.mark.parametrize("batch_size", [2, None])
def test_shares_of_the_examples_are_scored_alike_to_the_bit(model_folder, batch_size):
    loaded = load_model(model_folder, PartInferConfig(method="dense", device="cpu"))
    generator = random.Random(2)
    examples = [
        Example([generator.randrange(2, 60) for _ in range(9 + i)], [generator.randrange(2, 60) for _ in range(4)])
        for i in range(5)
    ]
    whole = score_examples(method_logits(loaded.model, examples, batch_size), examples, None, is_dense=True)
    parts = [
        score_examples(method_logits(loaded.model, examples, batch_size, (n, 2)), examples, None, is_dense=True)
        for n in range(2)
    ]
    assert all(0 < np.isfinite(part["nll"]).sum() < 5 for part in parts)
    assert together(parts)["nll"].tolist() == whole["nll"].tolist()


def test_tables_and_counts_are_put_together():
    nan = float("nan")
    tables = [{"nll": np.array([1.0, nan, 3.0])}, {"nll": np.array([nan, 2.0, nan])}]
    assert together(tables)["nll"].tolist() == [1.0, 2.0, 3.0]
    counts = {"computed_neurons": 5, "block_bytes_fraction": 0.5, "token_bytes": 10, "loaded_fraction": 0.7}
    merged = merged_counts(
        [
            {**counts, "decoded_tokens": 3, "ffn_bytes_fraction": 0.4},
            {**counts, "decoded_tokens": 1, "ffn_bytes_fraction": 0.8, "token_bytes": 30},
        ]
    )
    assert merged["decoded_tokens"] == 4
    assert merged["computed_neurons"] == 10
    assert merged["ffn_bytes_fraction"] == pytest.approx(0.5)
    assert merged["token_bytes"] == 15
    assert merged["loaded_fraction"] == 0.7
