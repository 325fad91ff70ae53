"""The NEON variants, compiled for aarch64 and run under emulation (cross/run.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_neon_under_emulation():
    if shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("needs apt-get install g++-aarch64-linux-gnu qemu-user")
    script = Path(__file__).parent / "cross" / "run.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon_dotprod" in done.stdout
    assert done.stdout.count(" 0 failures") == 2
