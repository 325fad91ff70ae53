"""evaluate_task.py end to end on a tiny model, made-up local data, and no hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from evaluation.answer_log import AnswerLog
from evaluation.evaluate_task import main
from evaluation.results import is_finished, result_path
from evaluation.task_groups import task_type_of
from evaluation.tasks import local_data
from tests.conftest import ROOT
from tests.evaluation.conftest import SETTINGS
from transformers_patches.errors import PartInferError

SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def flags(model_folder, ranking_paths, data_folder, tmp_path) -> list[str]:
    named = {"model_name": model_folder, "data_dir": data_folder, "output_path": tmp_path, "device": "cpu"}
    named |= SETTINGS | ranking_paths | {"bootstrap_iters": 20, "batch_size": 2}
    return [f"--{name}={value}" for name, value in named.items()]


def result(tmp_path: Path, configuration: str, task: str) -> dict:
    return json.loads(result_path(tmp_path, "tiny-llama", configuration, task).read_text(encoding="utf-8"))


def test_several_tasks_and_methods_leave_a_result_each(flags, tmp_path, capsys):
    tasks, methods = "local_piqa,local_triviaqa", "dense,partinfer,coreinfer_random"
    assert main([*flags, "--task_name", tasks, "--method", methods, "--log_samples"]) == 0
    for configuration, fraction in (("dense", 1.0), ("partinfer", 0.4), ("coreinfer_random_loading", 0.4)):
        content = result(tmp_path, configuration, "local_piqa")
        assert [metric["metric"] for metric in content["metrics"]] == ["acc", "acc_norm"]
        assert content["rows"] == {"local_piqa": 4}  # the second half of 8
        assert content["weights"]["ffn_bytes_fraction"] == pytest.approx(fraction)
        assert content["run"]["task_type"] == "QA"
    counted = result(tmp_path, "partinfer", "local_piqa")["weights"]
    assert counted["computed_neurons"] == counted["decoded_tokens"] * 4 * 32 > 0
    generated = result(tmp_path, "partinfer", "local_triviaqa")
    assert generated["metrics"][0]["metric"] == "exact_match"
    assert generated["weights"]["ffn_bytes_fraction"] == pytest.approx(0.4)
    samples = tmp_path / "tiny-llama" / "partinfer" / "local_piqa.samples.jsonl"
    goals = [json.loads(line)["doc"]["goal"] for line in samples.read_text(encoding="utf-8").strip().split("\n")]
    assert goals == [f"open jar {i}" for i in range(4, 8)]
    assert "| local_piqa | partinfer | acc |" in capsys.readouterr().out


def test_sweeps_have_a_folder_each(flags, tmp_path):
    assert main([*flags, "--task_name=local_piqa", "--sparsity=0.3,0.5", "--limit=1"]) == 0
    for sparsity in (0.3, 0.5):
        content = result(tmp_path, f"partinfer_sparsity{sparsity}", "local_piqa")
        assert content["weights"]["ffn_bytes_fraction"] == pytest.approx(sparsity)
        assert content["rows"] == {"local_piqa": 1}


def test_finished_runs_are_skipped_and_others_are_not(flags, tmp_path, capsys):
    run = [*flags, "--task_name=local_piqa", "--limit=1", "--skip_finished"]
    assert main(run) == 0
    path = result_path(tmp_path, "tiny-llama", "partinfer", "local_piqa")
    before = path.stat().st_mtime_ns
    assert main(run) == 0
    assert "finished" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before
    assert main([*flags, "--task_name=local_piqa", "--limit=2", "--skip_finished"]) == 0
    assert path.stat().st_mtime_ns != before
    assert not is_finished(path, {"limit": 2})


def test_shuffle_draws_the_rows_of_the_limit_with_the_seed(flags, tmp_path):
    def drawn(*more: str) -> list[int]:
        run = [*flags, "--task_name=local_piqa", "--limit=2", "--log_samples", *more]
        assert main(run) == 0
        path = tmp_path / "tiny-llama" / "partinfer" / "local_piqa.samples.jsonl"
        lines = path.read_text(encoding="utf-8").strip().split("\n")
        return [int(json.loads(line)["doc"]["goal"].split()[-1]) for line in lines]

    assert drawn() == [4, 5]  # the first of the report half
    assert result(tmp_path, "partinfer", "local_piqa")["rows"] == {"local_piqa": 2}
    samples = {seed: drawn("--shuffle", f"--seed={seed}") for seed in range(3)}
    assert all(set(rows) < {4, 5, 6, 7} and len(rows) == 2 for rows in samples.values())
    assert len({tuple(rows) for rows in samples.values()}) > 1
    assert drawn("--shuffle", "--seed=2") == samples[2]
    assert result(tmp_path, "partinfer", "local_piqa")["rows"] == {"local_piqa": 2}
    assert len(drawn("--shuffle", "--limit=9")) == 4


def test_few_shot_examples_come_from_the_calibration_half(flags, tmp_path):
    assert main([*flags, "--task_name=local_triviaqa", "--num_fewshot=2", "--limit=1", "--log_samples"]) == 0
    line = (tmp_path / "tiny-llama" / "partinfer" / "local_triviaqa.samples.jsonl").read_text(encoding="utf-8")
    prompt = json.loads(line)["arguments"][0][0]
    assert prompt.count("Question: ") == 3
    assert prompt.endswith("Question: What is 4 and 4?\nAnswer:")
    assert all(f"What is {i} and" not in prompt for i in (5, 6, 7))


def test_own_tasks_by_include_path(flags, tmp_path, data_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: piqa/validation.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: goal\ndoc_to_target: label\n"
        'doc_to_choice: "{{[sol1, sol2]}}"\nmetric_list: [{metric: acc}]\n',
        encoding="utf-8",
    )
    assert main([*flags, "--task_name=mine", "--include_path=own", "--task_type=QA", "--limit=2"]) == 0
    assert result(tmp_path, "partinfer", "mine")["rows"] == {"mine": 2}


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--task_name=local_squad"], "the data of local_squad can't be read"),
        (["--task_name=local_piqa", "--data_dir=/nowhere"], "no folder /nowhere"),
        (["--task_name=local_piqa", "--include_path=/nowhere"], "no folder /nowhere"),
    ],
)
def test_missing_data_is_one_line(flags, wrong, message):
    with pytest.raises(PartInferError, match=message):
        main([*flags, *wrong])


@pytest.mark.parametrize("wrong", [["--limit=0"], ["--batch_size=many"], ["--method=fancy"], ["--scored_tokens=0"]])
def test_wrong_usage_ends_with_2(flags, wrong):
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--task_name=local_piqa", *wrong])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    "command, folder",
    [
        ([str(ROOT / "evaluation" / "evaluate_task.py")], "/"),
        (["evaluate_task.py"], ROOT / "evaluation"),
        (["-m", "evaluation.evaluate_task"], ROOT),
    ],
)
def test_the_script_runs_from_anywhere(command, folder):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--token_sparsity" in done.stdout


def test_plain_lm_eval_knows_the_model(model_folder, ranking_paths, data_folder, tmp_path):
    settings = {"pretrained": model_folder, "sparsity": 0.4} | SETTINGS | ranking_paths
    model_args = ",".join(f"{name}={value}" for name, value in settings.items())
    command = ["-m", "evaluation.partinfer_lm", "run", "--model", "partinfer", "--model_args", model_args]
    command += ["--tasks", "local_piqa", "--include_path", str(ROOT / "evaluation" / "tasks"), "--limit", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--output_path", str(tmp_path)],
        cwd=data_folder,  # plain lm-eval takes relative data files from the current folder
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(next(tmp_path.rglob("results_*.json")).read_text(encoding="utf-8"))
    assert written["config"]["partinfer"]["ffn_bytes_fraction"] == pytest.approx(0.4)
    assert "acc,none" in written["results"]["local_piqa"]


@pytest.mark.parametrize(
    "task, group",
    [
        ("triviaqa", "QA"),
        ("mlqa_en_en", "QA"),
        ("local_squad", "QA"),
        ("cnn_dailymail", "Summarize"),
        ("wmt16-ro-en", "translate_de_en"),
        ("local_translation_de_en", "translate_de_en"),
        ("local_wikitext", None),
    ],
)
def test_tasks_belong_to_their_group(task, group):
    assert task_type_of(task) == group


def test_halves_share_no_row():
    rows = Dataset.from_dict({"i": list(range(7))})
    assert local_data.calibration_half(rows)["i"][:] == [0, 1, 2]
    assert local_data.report_half(rows)["i"][:] == [3, 4, 5, 6]


def test_wikitext_lines_become_articles():
    lines = ["", " = One = ", "text", " = = Part = = ", "more", " = Two = ", "end"]
    pages = local_data.wikitext_articles(Dataset.from_dict({"text": lines}))["page"][:]
    assert pages == [" = One = \ntext\n = = Part = = \nmore", " = Two = \nend"]


def test_answers_are_scored_by_words():
    doc = {"answers": {"text": ["The Denver Broncos", "Broncos"]}}
    assert local_data.answer_scores(doc, [" broncos."]) == {"exact_match": 1.0, "f1": 1.0}
    scores = local_data.answer_scores(doc, ["Denver Broncos team"])
    assert scores == {"exact_match": 0.0, "f1": pytest.approx(0.8)}
    assert local_data.answer_scores(doc, [""]) == {"exact_match": 0.0, "f1": 0.0}


def test_summaries_are_scored_by_rouge():
    assert local_data.article_scores({"highlights": "a cat sat"}, ["a cat sat"])["rougeL"] == pytest.approx(1.0)
    assert local_data.document_scores({"summary": "a cat sat"}, ["dogs run"])["rouge1"] == 0.0


def data_files(task: str) -> set[str]:
    """The files below --data_dir that a local task reads, also through the task that it includes."""
    text = (ROOT / "evaluation" / "tasks" / f"{task}.yaml").read_text(encoding="utf-8")
    included = re.findall(r"^include: (\w+)\.yaml", text, re.MULTILINE)
    files = set(re.findall(r"^ +(?:train|validation|test): (\S+)", text, re.MULTILINE))
    return files.union(*map(data_files, included)) if "custom_dataset" not in text else set()


def test_every_local_task_runs_on_the_real_data(flags, tmp_path):
    shown = [flag for flag in flags if not flag.startswith("--data_dir")]
    names = {path.stem for path in (ROOT / "evaluation" / "tasks").glob("local_*.yaml")}
    # the tiny model has no chat template
    names = {name for name in names if not name.endswith("_chat") and name != "local_instructions"}
    tasks = sorted(name for name in names if all((SHARED_DATA / file).is_file() for file in data_files(name)))
    if not tasks:
        pytest.skip("the data sets for machines without a hub are not there")
    limits = ["--limit=1", "--max_length=250", "--gen_kwargs=max_gen_toks=16", f"--data_dir={SHARED_DATA}"]
    limits.append("--run_generated_code")
    assert main([*shown, *limits, "--task_name", ",".join(tasks)]) == 0
    for task in tasks:
        assert result(tmp_path, "partinfer", task)["metrics"], task


@pytest.mark.parametrize(
    ("task", "method"), [("local_piqa", "dense"), ("local_piqa", "partinfer"), ("own", "partinfer")]
)
def test_a_run_that_was_stopped_goes_on_within_the_task(flags, tmp_path, data_folder, monkeypatch, task, method):
    """Of scores, and of windows of whole texts."""
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: piqa/validation.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: goal\n"
        "metric_list: [{metric: word_perplexity}]\n",
        encoding="utf-8",
    )
    run = [*flags, f"--task_name={task}", f"--method={method}", f"--include_path={tmp_path}", "--scored_tokens=4"]
    run += ["--prefill_tokens=4", "--batch_size=1", "--skip_finished", "--task_type=QA"]
    add, kept = AnswerLog.add_partial, []

    def stopped(self, kind, request, answer) -> None:
        if len(kept) == 3:
            raise KeyboardInterrupt
        add(self, kind, request, answer)
        kept.append(request)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "add_partial", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(run)
    log = result_path(tmp_path, "tiny-llama", method, task).with_suffix(".answers.jsonl")
    assert log.read_text(encoding="utf-8").count("\n") == 3
    with pytest.raises(PartInferError, match="run with other settings"):
        main([*run, "--limit=2"])
    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "add_partial", lambda self, *rest: (kept.append(rest[1]), add(self, *rest)))
        assert main(run) == 0
    scored = [request for request in kept if len(request) == 2]  # a whole text's sum is no answer of its own
    assert len(scored) > 3
    assert not set(scored[:3]) & set(scored[3:])
    assert not log.exists()
    went_on = result(tmp_path, method, task)
    assert went_on["answers_kept"] == 3
    assert main([option for option in run if option != "--skip_finished"]) == 0
    assert result(tmp_path, method, task)["metrics"] == went_on["metrics"]
