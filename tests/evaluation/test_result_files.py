"""Result files are whole or not there: killed writers, two writers, full disks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from evaluation.results import is_finished, read_results, result_path, write_result
from tests.conftest import fill
from tests.killed import ROOT, hidden, run_killed
from transformers_patches.locks import exclusive

RUN = {"model": "tiny", "seed": 1}


def test_a_killed_run_has_no_result_and_the_next_one_clears_what_it_left(tmp_path):
    path = result_path(tmp_path, "tiny", "dense", "piqa")
    run_killed(
        f"from pathlib import Path; from evaluation.results import write_result; write_result(Path({str(path)!r}), {{}})"
    )
    assert not is_finished(path, RUN)
    assert read_results(tmp_path) == []
    assert len(hidden(path.parent)) == 2  # the unfinished file, and the lock
    write_result(path, {"run": RUN})
    assert is_finished(path, RUN)
    assert os.listdir(path.parent) == ["piqa.json"]


def test_answers_belong_to_the_result_beside_them(tmp_path):
    path = result_path(tmp_path, "tiny", "dense", "piqa")

    def write(seed: int) -> None:
        for _ in range(5):
            write_result(path, {"run": {"seed": seed}}, {"piqa": [{"seed": seed}] * 2000})
            with exclusive(path, wait=True):
                found.append((path.read_text(), path.with_name("piqa.samples.jsonl").read_text()))

    found: list[tuple[str, str]] = []
    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for result, samples in found:
        assert samples == (json.dumps({"seed": json.loads(result)["run"]["seed"]}) + "\n") * 2000
    assert hidden(path.parent) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 99999, "\udcff"])
def test_a_damaged_result_is_not_finished(content, tmp_path):
    path = tmp_path / "piqa.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert not is_finished(path, RUN)


JSON_WRITER = """
import sys
from transformers_patches.cli import write_json
for _ in range(40):
    write_json(sys.argv[1], {"by": sys.argv[2] * 20000}, indent=1)
"""


def test_programs_that_write_json_at_once_leave_whole_files(tmp_path):
    path = tmp_path / "result.json"
    writers = [subprocess.Popen([sys.executable, "-c", JSON_WRITER, path, by], cwd=ROOT) for by in "abc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(json.loads(path.read_text())["by"])
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert seen <= {by * 20000 for by in "abc"}
    assert os.listdir(tmp_path) == ["result.json"]


def test_two_runs_at_once_leave_the_result_of_one(tmp_path):
    path = result_path(tmp_path, "tiny", "dense", "piqa")
    results = [{"run": {"seed": seed}, "values": [seed] * 5000} for seed in range(4)]
    threads = [threading.Thread(target=write_result, args=(path, result)) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (found,) = read_results(tmp_path)
    assert {name: found[name] for name in ("run", "values")} in results
    assert hidden(path.parent) == []


def test_a_full_disk_keeps_the_earlier_result(small_disk):
    path = small_disk / "piqa.json"
    write_result(path, {"run": RUN})
    fill(small_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_result(path, {"run": RUN, "values": [0] * 10**5})
    assert caught.value.filename == str(path)
    assert is_finished(path, RUN)
    assert sorted(os.listdir(small_disk)) == ["filler", "piqa.json"]
