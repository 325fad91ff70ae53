"""Result files are whole or not there: killed writers, two writers, full disks."""

from __future__ import annotations

import os
import threading

import pytest

from evaluation.results import is_finished, read_results, result_path, write_result
from tests.conftest import fill
from tests.killed import hidden, run_killed

RUN = {"model": "tiny", "seed": 1}


def test_a_killed_run_has_no_result_and_the_next_one_clears_what_it_left(tmp_path):
    path = result_path(tmp_path, "tiny", "dense", "piqa")
    run_killed(
        f"from pathlib import Path; from evaluation.results import write_result; write_result(Path({str(path)!r}), {{}})"
    )
    assert not is_finished(path, RUN)
    assert read_results(tmp_path) == []
    assert len(hidden(path.parent)) == 1
    write_result(path, {"run": RUN})
    assert is_finished(path, RUN)
    assert os.listdir(path.parent) == ["piqa.json"]


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
