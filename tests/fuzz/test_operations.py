"""The native operations with arguments that don't fit: they are refused, or computed, but never kill the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.operation_calls import DECODER, operations
from tests.fuzz.rows_on_disk_calls import ROWS
from transformers_patches import kernels

ROOT = Path(__file__).parents[2]
MOST_CRASHES = 20  # then it is clear enough

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.why_not()}")


def campaign(folder: Path, count: int, seed: int = 0) -> tuple[list[dict], list[str]]:
    """So many calls of every kind: what came of each kind, and the calls that killed the process."""
    progress, results, crashes, after = folder / "progress", [], [], []
    command = [sys.executable, "-m", "tests.fuzz.operation_calls", "--count", str(count), "--seed", str(seed)]
    command += ["--progress", str(progress)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    while len(crashes) < MOST_CRASHES:
        done = subprocess.run(
            [*command, *after], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        results += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode == 0:
            break
        assert progress.is_file(), done.stderr
        kind, number = progress.read_text().split()
        crashes.append(f"{kind} {number}: exit code {done.returncode}, {done.stderr[-500:]}")
        after = ["--after", kind, number]
    return results, crashes


def check(results: list[dict], crashes: list[str], count: int) -> None:
    assert not crashes
    assert {result["kind"] for result in results} == {*operations(), DECODER, ROWS}
    for result in results:
        outcomes, kind = result["outcomes"], result["kind"]
        assert result["fitting"] == "done", f"{kind}: arguments that fit are refused"
        assert sum(outcomes.values()) == count, kind
        assert set(outcomes) <= {"done", "refused"}, f"{kind}: {outcomes}"
        takes_none = kind in ("variants", "variant", "forget_mapping")
        assert takes_none or outcomes["refused"] > count / 10, f"{kind}: hardly anything was wrong: {outcomes}"


def test_calls_that_do_not_fit(tmp_path):
    check(*campaign(tmp_path, 300), 300)


@pytest.mark.slow
def test_many_calls_that_do_not_fit(tmp_path):
    check(*campaign(tmp_path, 10_000, seed=1), 10_000)
