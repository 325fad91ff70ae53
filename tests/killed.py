"""Processes that are killed where it hurts most: with everything written, just before it gets its name."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_CODE = """
import os, signal, sys
replace, count = os.replace, 0
def killing(source, target, **more):
    global count
    count += 1
    if count == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target, **more)
os.replace = killing
{code}
"""


def run_killed(code: str, nth: int = 1) -> None:
    """Run Python code in a process of its own that is killed at the nth rename; AssertionError if it was not."""
    command = [sys.executable, "-c", _CODE.format(code=code, nth=nth)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def hidden(folder: Path) -> list[str]:
    """Names of the hidden files and folders in a folder: what is unfinished, and locks."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
