"""report.py on a small results folder."""

from __future__ import annotations

import csv
import json

import pytest

from evaluation.report import main
from evaluation.report_rows import mean_relative, perplexity_rows, task_rows
from evaluation.results import result_path, write_result
from transformers_patches.errors import PartInferError


def put_task(folder, configuration: str, method: str, task: str, metric: str, value: float, fraction: float) -> None:
    run = {"limit": 10, "num_fewshot": None, "seed": 0, "apply_chat_template": False, "system_instruction": None}
    run |= {"shuffle": True, "max_length": None, "prefill_tokens": 256, "scored_tokens": 128, "gen_kwargs": None}
    run |= {"settings": {"sparsity": 0.4, "loaded_neurons_percent": 0.7}}
    weights = {
        "ffn_bytes_fraction": fraction,
        "decoded_tokens": 9,
        "weight_bytes_resident": 1000 * fraction,
        "token_bytes": 500 * fraction,
    }
    result = {
        "model": "m",
        "task": task,
        "configuration": configuration,
        "method": method,
        "metrics": [{"task": task, "metric": metric, "filter": "none", "value": value, "stderr": 0.01}],
        "rows": {task: 10},
        "weights": weights,
        "run": run,
        "seconds": 1.0,
    }
    write_result(result_path(folder, "m", configuration, task), result)


@pytest.fixture
def folder(tmp_path):
    for task, metric, dense, sparse in (
        ("piqa", "acc", 0.8, 0.6),
        ("wiki", "word_perplexity", 20.0, 40.0),
        ("hopeless", "exact_match", 0.0, 0.0),
    ):
        put_task(tmp_path, "dense", "dense", task, metric, dense, 1.0)
        put_task(tmp_path, "partinfer", "partinfer", task, metric, sparse, 0.4)
    shared = {"examples": 6, "kl_to_dense": 0.1, "top1_agreement": 0.9, "perplexity": 9.0, "nll_ci": [1.0, 3.0]}
    sizes = {"ffn_bytes_fraction": 0.4, "weight_bytes_resident": 700, "token_bytes": 300}
    rows = [
        {"label": label, "method": label, "nll": nll, "excess_nll": nll - 2.0, **shared, **sizes}
        for label, nll in (("dense", 2.0), ("partinfer", 2.5))
    ]
    (tmp_path / "wikitext.json").write_text(json.dumps({"model": "m", "dataset": "/x/test.txt", "rows": rows}))
    return tmp_path


def test_tables_and_figures(folder, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("report")
    assert main([str(folder), "--output_path", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| task | metric | samples | dense | partinfer |" in text
    assert "| piqa | acc | 10 | 0.800 ± 0.010 | 0.600 ± 0.010 |" in text
    assert "| wiki | word_perplexity | 10 | 20.000 ± 0.010 | 40.000 ± 0.010 |" in text
    assert "| hopeless | exact_match | 10 | 0.000 ± 0.010 | 0.000 ± 0.010 |" in text
    assert "| partinfer | 0.625 | 2 | 0.400 | 0.400 | 0.400 |" in text  # the mean of two tasks
    assert "| partinfer | 2.500 [1.000, 3.000] | 0.500 |" in text
    assert (out / "report.md").read_text(encoding="utf-8").strip() == text.strip()
    rows = list(csv.DictReader((out / "report_tasks.csv").open(encoding="utf-8")))
    assert {row["configuration"] for row in rows} == {"dense", "partinfer"}
    assert float(
        next(r for r in rows if r["task"] == "piqa" and r["method"] == "partinfer")["relative"]
    ) == pytest.approx(0.75)
    content = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert len(content["tasks"]) == 6
    assert {row["task"]: row["relative"] for row in content["tasks"] if row["method"] == "partinfer"} == {
        "piqa": pytest.approx(0.75),
        "wiki": 0.5,
        "hopeless": None,
    }
    assert len(content["perplexity"]) == 2
    for name in ("m_relative.png", "m_trade_off.png", "m_test.txt_excess_nll.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert name in text


def test_perplexities_that_were_scored_token_by_token_say_so(folder):
    result = json.loads((folder / "wikitext.json").read_text(encoding="utf-8"))
    (folder / "steps.json").write_text(json.dumps(result | {"scoring": "token_by_token"}), encoding="utf-8")
    rows = perplexity_rows(folder)
    steps = ["dense token by token", "partinfer token by token"]
    assert [row["configuration"] for row in rows] == [*steps, "dense", "partinfer"]
    assert [row["method"] for row in rows] == ["dense", "partinfer"] * 2


def test_bytes_of_runs_that_decoded_nothing_are_not_told(folder):
    path = result_path(folder, "m", "partinfer", "piqa")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["weights"] |= {"decoded_tokens": 0, "ffn_bytes_fraction": 0.7}
    path.write_text(json.dumps(content), encoding="utf-8")
    row = next(row for row in task_rows(folder) if row["task"] == "piqa" and row["method"] == "partinfer")
    assert row["ffn_bytes_fraction"] is row["token_bytes_fraction"] is None
    assert row["loaded_bytes_fraction"] == pytest.approx(0.4)
    mean = next(row for row in mean_relative(task_rows(folder)) if row["method"] == "partinfer")
    assert mean["ffn_bytes_fraction"] == pytest.approx(0.4)


def test_configurations_are_in_the_order_of_the_methods_and_a_metric_can_be_chosen(folder):
    put_task(folder, "coreinfer", "coreinfer", "piqa", "acc", 0.5, 0.4)
    path = result_path(folder, "m", "coreinfer", "piqa")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["metrics"].append({"task": "piqa", "metric": "acc_norm", "filter": "none", "value": 0.7, "stderr": None})
    path.write_text(json.dumps(content), encoding="utf-8")
    rows = [row for row in task_rows(folder) if row["task"] == "piqa"]
    assert [row["configuration"] for row in rows] == ["dense", "partinfer", "coreinfer"]
    assert [(row["metric"], row["score"]) for row in rows] == [("acc", 0.8), ("acc", 0.6), ("acc", 0.5)]
    chosen = next(row for row in task_rows(folder, ["acc_norm"]) if row["configuration"] == "coreinfer")
    assert (chosen["score"], chosen["relative"]) == (0.7, None)  # dense has no such metric


def test_a_report_in_the_results_folder_is_not_a_result(folder):
    assert main([str(folder), "--no_figures"]) == 0
    before = (folder / "report.json").read_text(encoding="utf-8")
    assert main([str(folder), "--no_figures"]) == 0
    assert (folder / "report.json").read_text(encoding="utf-8") == before


def test_results_of_other_samples_are_not_compared(folder, tmp_path):
    path = result_path(folder, "m", "dense", "piqa")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["run"]["limit"] = 20
    path.write_text(json.dumps(content), encoding="utf-8")
    assert main([str(folder), "--no_figures", "--json"]) == 0
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["tasks"]
    assert next(r for r in rows if r["task"] == "piqa" and r["method"] == "partinfer")["relative"] is None


def test_nothing_to_report_is_told(tmp_path):
    with pytest.raises(PartInferError, match="no results folder"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(PartInferError, match="holds no results"):
        main([str(tmp_path)])
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(PartInferError, match="is not valid JSON"):
        main([str(tmp_path)])
