"""docs/make_results.sh goes on after failures and skips what is finished; docs/results_page.py changes tables only."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from transformers_patches.errors import PartInferError

# stands for Python: says what it is called with, makes the file of --json, and fails for one task
FAKE = """#!/bin/sh
echo "$*" >> "$CALLS"
case $* in *local_squad*) exit 1 ;; esac
while [ $# -gt 1 ]; do [ "$1" = --json ] && mkdir -p "$(dirname "$2")" && echo '{}' > "$2"; shift; done
exit 0
"""


@pytest.fixture
def make(tmp_path):
    """Runs the script with a made-up Python, and returns its exit, what it said, and what it called."""
    fake, calls = tmp_path / "fake", tmp_path / "calls"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def run(*stages: str) -> tuple[int, str, list[str]]:
        calls.write_text("")
        names = {"PYTHON": fake, "DATA": tmp_path / "data", "OUT": tmp_path / "out", "CALLS": calls, "MODEL": "tiny"}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
        command = ["sh", str(ROOT / "docs" / "make_results.sh"), *stages]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr, calls.read_text().splitlines()

    return run


def test_a_step_that_fails_is_named_and_the_others_go_on(make, tmp_path):
    code, said, calls = make("tasks")
    assert code == 1
    assert "start again to repeat these only:\n  tasks qa 20 1 local_squad" in said
    assert any("local_wikitext" in call and "--skip_finished" in call for call in calls)
    assert all("--sparsity 0.4 --loaded_neurons_percent 0.7" in call for call in calls)  # as many bytes for all methods
    assert not any("gsm8k" in call for call in calls)  # there is no such data
    log = (tmp_path / "out" / "make_results.log").read_text()
    assert "ended with 1: tasks qa 20 1 local_squad" in log
    assert log.count("begins: ") == log.count("ended with ") == len(calls)


def test_finished_perplexities_are_skipped(make):
    code, _, calls = make("perplexity", "baselines")
    assert code == 0
    assert [call.count("--method") for call in calls] == [1] * 4
    assert "dense,cats,teal_uniform,wina_uniform" in calls[-1]
    assert make("perplexity", "baselines") == (0, "", [])


def test_without_a_fit_nothing_is_refitted(make, tmp_path):
    fit = tmp_path / "out" / "neurons" / "tiny" / "mix.fit.safetensors"
    _, _, calls = make("tasks", "perplexity")
    assert not any("fit_filepath" in call or "refit" in call for call in calls)
    fit.parent.mkdir(parents=True)
    fit.touch()
    for made in (tmp_path / "out" / "tiny").iterdir():
        made.unlink()
    _, _, calls = make("tasks", "perplexity")
    assert all(f"--fit_filepath {fit}" in call for call in calls)
    assert sum("--compensation none,mean,refit" in call for call in calls) == 3


def test_wrong_stages_are_refused(make):
    code, said, calls = make("everything")
    assert (code, calls) == (2, [])
    assert "got everything" in said


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("results_page", ROOT / "docs" / "results_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_replaced_and_other_text_stays(page, tmp_path):
    out: Path = tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("## a\n\nA\n\n## b\n\ntest.txt, 4 examples:\n\n![b](b_test.txt_excess_nll.png)\n")
    (out / "b_test.txt_excess_nll.png").write_bytes(b"figure")
    results = tmp_path / "results.md"
    results.write_text("# R\n\nText.\n\n<!-- tables of b -->\nold\n<!-- end of tables -->\n\nMore text.\n")
    assert page.main([str(out), "b", f"--page={results}"]) == 0
    tables = "wikitext-2 test, 4 examples:\n\n![b](results_b_wikitext2_excess_nll.png)"
    expected = f"# R\n\nText.\n\n<!-- tables of b -->\n\n{tables}\n\n<!-- end of tables -->\n\nMore text.\n"
    assert results.read_text() == expected
    assert (tmp_path / "results_b_wikitext2_excess_nll.png").read_bytes() == b"figure"
    with pytest.raises(PartInferError, match="no place for a"):
        page.main([str(out), "a", f"--page={results}"])
    with pytest.raises(PartInferError, match="no results of c"):
        page.main([str(out), "c", f"--page={results}"])
    assert results.read_text() == expected


def test_the_page_has_a_place_for_the_demo_model(page):
    changed = page.with_tables(page.PAGE.read_text(encoding="utf-8"), "SmolLM2-135M-Instruct", "other tables")
    assert "other tables\n\n<!-- end of tables -->\n\n## Qwen2.5" in changed
