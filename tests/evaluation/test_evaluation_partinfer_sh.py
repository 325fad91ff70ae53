"""evaluation_partinfer.sh: its commands, and a run that is started again."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.evaluation.conftest import SETTINGS

SCRIPT = ROOT / "evaluation" / "evaluation_partinfer.sh"
EIGHT = ["triviaqa", "squadv2", "piqa", "mlqa_en_en", "wmt16-de-en", "wmt16-ro-en", "cnn_dailymail", "xsum"]
SIX = "dense,dense+partial,partinfer,coreinfer,coreinfer+partial,coreinfer_random_loading"


def run(**variables) -> subprocess.CompletedProcess:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHON": sys.executable}
    environment = os.environ | offline | {name: str(value) for name, value in variables.items()}
    return subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)


def commands(**variables) -> list[dict[str, str]]:
    """The flags of each command that would run."""
    done = run(DRY_RUN="true", **variables)
    assert done.returncode == 0, done.stderr
    parsed = []
    for line in done.stdout.strip().split("\n"):
        words = [word for word in shlex.split(line)[2:] if word != "--skip_finished"]
        parsed.append(dict(zip(words[::2], words[1::2], strict=True)))
    return parsed


def test_six_configurations_over_eight_tasks():
    series = commands()
    assert [flags["--task_name"] for flags in series] == EIGHT
    assert {flags["--method"] for flags in series} == {SIX}
    assert all(flags["--sparsity"] == "0.4" and flags["--token_sparsity"] == "0.2" for flags in series)


def test_variables_come_from_the_environment():
    files = {
        f"{group}_NEURONS_FILEPATH": f"{group}.json" for group in ("QA", "SUMMARIZE", "TRANSLATE", "MODEL", "RANDOM")
    }
    options = {"SPARSITY": "0.3", "START_NUM": 2, "END_NUM": 9, "BASE_NEURONS_PERCENT": 0.1, "LIMIT": 7}
    series = {
        flags["--task_name"]: flags
        for flags in commands(MODEL_NAME="some-model", METHOD="partinfer", **options, **files)
    }
    for task, group in (("triviaqa", "QA"), ("xsum", "SUMMARIZE"), ("wmt16-ro-en", "TRANSLATE")):
        assert series[task]["--dataset_neurons_filepath"] == f"{group}.json"
        assert series[task]["--model_neurons_filepath"] == "MODEL.json"
        assert series[task]["--random_neurons_filepath"] == "RANDOM.json"
        assert series[task]["--method"] == "partinfer"
        assert (series[task]["--start_num"], series[task]["--end_num"], series[task]["--limit"]) == ("2", "9", "7")


@pytest.mark.parametrize(
    "method, improvements, expected",
    [
        ("dense", "both", "dense,dense+partial"),
        ("coreinfer", "true", "coreinfer+partial"),
        ("coreinfer", "false", "coreinfer"),
        ("original", "both", "original"),
        ("coreinfer_random_loading", "both", "coreinfer_random_loading"),
    ],
)
def test_one_method_can_be_chosen(method, improvements, expected):
    series = commands(METHOD=method, USE_PARTINFER_IMPROVEMENTS=improvements, TASKS="piqa")
    assert [flags["--method"] for flags in series] == [expected]


def test_wrong_variables_are_told():
    for wrong in ({"METHOD": "fancy"}, {"USE_PARTINFER_IMPROVEMENTS": "maybe"}):
        done = run(DRY_RUN="true", **wrong)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")


def test_a_series_that_is_started_again_skips_what_is_finished(model_folder, ranking_paths, data_folder, tmp_path):
    variables = {
        "MODEL_NAME": model_folder,
        "TASKS": "local_piqa local_squad",  # the second has no data
        "DATA_DIR": data_folder,
        "OUTPUT_PATH": tmp_path,
        "LIMIT": 1,
        "QA_NEURONS_FILEPATH": ranking_paths["dataset_neurons_filepath"],
        "START_NUM": SETTINGS["start_num"],
        "END_NUM": SETTINGS["end_num"],
        "METHOD": "partinfer",
    }
    first = run(**variables)
    assert first.returncode == 1
    assert "failed: local_squad" in first.stderr
    assert [path.name for path in tmp_path.rglob("*.json")] == ["local_piqa.json"]
    second = run(**variables)
    assert "local_piqa, partinfer: finished" in second.stderr
