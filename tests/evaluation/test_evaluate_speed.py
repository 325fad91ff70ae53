"""evaluate_speed.py end to end on a tiny model, and its parts: engines, GGUF files, rows."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evaluation.compared.kinds import ComparedFile
from evaluation.evaluate_speed import main
from evaluation.methods import Configuration
from evaluation.speed.engines import BEST, DEFAULT, PartInferEngine, TransformersEngine
from evaluation.speed.job import Job, Timing
from evaluation.speed.rows import measured_row, speedup
from tests.conftest import FAMILY_CONFIGS
from tests.evaluation.conftest import SETTINGS
from tests.tiny_gguf import write_tiny_gguf
from transformers_patches import flags
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf_writer import write_gguf
from transformers_patches.weights.safetensors_folder import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
KEYS = {  # of the rows in --json, by the issue that asked for them
    *("label", "method", "dtype", "sparsity", "loaded_neurons_percent", "decode_tokens_per_second"),
    *("prefill_tokens_per_second", "time_to_first_token_s", "load_s", "weight_bytes_resident"),
    *("weight_bytes_per_token", "gigabytes_per_second", "probe_gigabytes_per_second", "peak_memory_bytes"),
}
PROMPT = [list(range(3, 11))]


def job(engine: str, folder: Path | None = None, **options) -> Job:
    values = {
        "label": "it",
        "dtype": "float32",
        "float_dtype": "float32",
        "shape": None,
        "threads": 1,
        "device": "cpu",
        "seed": 0,
    }
    return Job(engine=engine, folder=folder, **(values | options))


def test_methods_and_settings_in_one_run(model_folder, ranking_paths, tmp_path):
    flags = [f"--{name}={value}" for name, value in (SETTINGS | ranking_paths).items()]
    flags += ["--method=dense,partinfer", "--sparsity=0.35,0.5", "--prompt_length=8", "--num_tokens_to_generate=5"]
    flags += ["--repetitions=2", "--cpu_only", "--threads=1", f"--model_name={model_folder}"]
    outputs = {name: tmp_path / f"speed.{end}" for name, end in (("json", "json"), ("csv", "csv"), ("plot", "png"))}
    assert main([*flags, *(f"--{name}={path}" for name, path in outputs.items())]) == 0
    result = json.loads(outputs["json"].read_text(encoding="utf-8"))
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "partinfer sparsity=0.35", "partinfer sparsity=0.5"]
    for row in rows.values():
        assert row.keys() >= KEYS
        assert row["decode_tokens_per_second_min"] <= row["decode_tokens_per_second"]
        assert row["decode_tokens_per_second"] <= row["decode_tokens_per_second_max"]
        assert row["peak_memory_bytes"] > row["weight_bytes_resident"]
        assert row["gigabytes_per_second"] * 1e9 == pytest.approx(
            row["weight_bytes_per_token"] * row["decode_tokens_per_second"]
        )
    assert rows["dense"]["speedup_over_dense"] == 1
    assert rows["dense"]["selection_s"] == 0 < rows["partinfer sparsity=0.5"]["selection_share_of_prefill"] < 1
    assert rows["dense"]["computed_neurons_percent"] == 1
    assert rows["partinfer sparsity=0.5"]["computed_neurons_percent"] == pytest.approx(0.5)
    assert rows["partinfer sparsity=0.35"]["neurons_per_layer_and_token"] == round(0.35 * 80)
    bytes_per_token = [row["weight_bytes_per_token"] for row in rows.values()]
    assert bytes_per_token[0] > bytes_per_token[2] > bytes_per_token[1]
    with open(outputs["csv"], encoding="utf-8") as file:
        assert [row["label"] for row in csv.DictReader(file)] == list(rows)
    assert outputs["plot"].read_bytes().startswith(b"\x89PNG")


def test_random_weights_count_what_is_computed(tmp_path):
    AutoConfig.for_model("llama", **FAMILY_CONFIGS["llama"][1]).save_pretrained(tmp_path)
    shape = {"shape": str(tmp_path / "config.json")}
    settings = PartInferConfig(sparsity=0.4, dtype="float32", device="cpu", **SETTINGS)
    engine = PartInferEngine(job("partinfer", configuration=Configuration("it", "partinfer", settings), **shape))
    timing = engine.run("it", PROMPT * 2, 4)  # a batch of two
    facts = engine.facts("it")
    assert len(timing.token_seconds) == 4
    assert facts["computed_neurons_percent"] == pytest.approx(0.4)
    assert facts["neurons_per_layer_and_token"] == 32
    dense = Configuration("it", "dense", PartInferConfig(method="dense", dtype="float32", device="cpu"))
    plain = TransformersEngine(job("transformers", **shape))
    own = PartInferEngine(job("partinfer", configuration=dense, **shape))
    for name in ("weight_bytes_resident", "weight_bytes_per_token"):
        assert plain.facts(DEFAULT)[name] == own.facts("it")[name] > facts[name]
    ours, theirs = own.loaded.model, plain.model
    assert all(map(torch.equal, ours.parameters(), theirs.parameters())), "the same random weights for each engine"


def test_types_of_weights_are_measured_together(tmp_path):
    AutoConfig.for_model("llama", **FAMILY_CONFIGS["llama"][1]).save_pretrained(tmp_path)
    run = [f"--random_weights={tmp_path / 'config.json'}", "--dtypes=bfloat16,int8", "--method=dense", "--cpu_only"]
    run += ["--prompt_length=4", "--num_tokens_to_generate=3", "--repetitions=1", f"--json={tmp_path / 'it.json'}"]
    assert main(run) == 0
    rows = json.loads((tmp_path / "it.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["label"], row["dtype"]) for row in rows] == [("dense bfloat16", "bfloat16"), ("dense int8", "int8")]
    assert rows[0]["weight_bytes_per_token"] > 1.5 * rows[1]["weight_bytes_per_token"]
    assert rows[0]["speedup_over_dense"] == 1


def test_transformers_has_two_rows(model_folder):
    engine = TransformersEngine(job("transformers", model_folder))
    assert [len(engine.run(variant, PROMPT, 3).token_seconds) for variant in engine.variants] == [3, 3]
    assert "oneDNN" in engine.facts(BEST)["settings"]
    assert torch.backends.mkldnn.enabled


def test_a_row_is_made_of_medians():
    facts = {"weight_bytes_per_token": 10**6}
    timings = [Timing((1.0, 1.5, 2.0)), Timing((2.0, 2.1, 2.2)), Timing((3.0, 3.2, 3.4))]
    row = measured_row(timings, facts, probe=10e6, batch=1, prompt_length=30)
    assert row["decode_tokens_per_second"] == pytest.approx(5)
    assert row["decode_tokens_per_second_max"] == pytest.approx(10)
    assert row["time_to_first_token_s"] == 2
    assert row["prefill_tokens_per_second"] == 15
    assert row["share_of_probe"] == pytest.approx(0.5)
    assert speedup(timings, [Timing((1.0, 2.0, 3.0))] * 3) == pytest.approx(5)
    assert speedup(timings, None) is None
    several = measured_row(timings, facts, probe=10e6, batch=4, prompt_length=30)
    assert several["decode_tokens_per_second"] == pytest.approx(20)
    assert several["gigabytes_per_second"] is None


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_llama_cpp_generates_the_same_tokens(tiny_checkpoints, family, tmp_path):
    from evaluation.speed.llama_cpp_engine import LlamaCppEngine

    folder = tiny_checkpoints[family]
    write_gguf(tmp_path / "it.gguf", Checkpoint(folder), AutoConfig.from_pretrained(folder), "float32")
    engine = LlamaCppEngine(job("llama.cpp", compared=ComparedFile(tmp_path / "it.gguf", "float32", "", 1)))
    assert len(engine.run("it", PROMPT, 12).token_seconds) == 12
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(torch.tensor(PROMPT), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert engine.generated == expected[0, len(PROMPT[0]) :].tolist()


def test_one_line_without_llama_cpp(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PartInferError, match="llama.cpp is not installed"):
        main(["--random_weights", "smollm2-135m", "--compare", "llama.cpp", "--device", "cpu"])


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--random_weights", "llama3-1b", "--model_name", "x"],
        ["--random_weights", "llama3-1b", "--compare", "vllm"],
        ["--random_weights", "llama3-1b", "--compare", "llama.cpp", "--batch_size", "2"],
        ["--random_weights", "llama3-1b", "--repetitions", "0"],
        ["--random_weights", "llama3-1b", "--method", "fancy"],
        ["--random_weights", "llama3-1b", "--prompt", "text"],
    ],
)
def test_wrong_usage_ends_with_2(flags):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2


def test_the_script_runs_from_the_root_and_from_its_folder():
    for script, folder in (("evaluate_speed.py", ROOT), ("evaluate_speed.py", ROOT / "evaluation")):
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=folder, capture_output=True, text=True, check=True
        )
        assert "--random_weights" in done.stdout


def test_processes_know_the_keys_that_are_ignored(tmp_path, monkeypatch):
    """Each model has a process of its own, which reads the file again."""
    monkeypatch.setattr(flags, "IGNORED_GGUF_KEYS", ignored := set())
    for module in ("transformers_patches.weights.gguf_schema", "evaluation.speed.measure"):
        monkeypatch.setattr(f"{module}.IGNORED_GGUF_KEYS", ignored)
    write_tiny_gguf(tmp_path / "tiny.gguf", metadata={"llama.attention.unheard_of": 1})
    run = [f"--checkpoint_path={tmp_path / 'tiny.gguf'}", "--method=dense", "--cpu_only", "--prompt_length=4"]
    run += ["--num_tokens_to_generate=3", "--repetitions=1", f"--json={tmp_path / 'it.json'}"]
    with pytest.raises(PartInferError, match="llama.attention.unheard_of, which is not understood"):
        main(run)
    assert main([*run, "--ignore_gguf_key=llama.attention.unheard_of"]) == 0
    assert len(json.loads((tmp_path / "it.json").read_text(encoding="utf-8"))["rows"]) == 1
