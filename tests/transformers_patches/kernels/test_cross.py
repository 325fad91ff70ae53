"""The variants of other processors, checked under emulation (cross/run.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "cross" / "run.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_neon_under_emulation():
    if shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("needs apt-get install g++-aarch64-linux-gnu qemu-user")
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon_dotprod" in done.stdout
    assert done.stdout.count(" 0 failures") == 2


@pytest.mark.slow
def test_avx512_as_plain_loops():
    if not Path("/usr/include/simde/x86/avx512.h").is_file():
        pytest.skip("needs apt-get install libsimde-dev")
    done = run("avx512")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"linear {name} " in done.stdout for name in ("avx512", "avx512_vnni", "avx512_bf16"))
    assert "4 variants, 0 failures" in done.stdout


def test_unknown_target():
    done = run("sve")
    assert done.returncode == 2
    assert done.stderr == "error: expected neon or avx512, got sve\n"
