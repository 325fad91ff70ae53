"""Run a generated program in a process of its own: limits of time and memory, no network, an empty folder.

This keeps a careless program from doing harm. It is no prison for a malicious one: for that, run the whole evaluation in
a container.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHILD = Path(__file__).with_name("child.py")
PASSED, OUT_OF_TIME = "passed", "out of time"
# Namespaces of its own: without network, and with a process number 1 whose end ends all others.
NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
# Process number 1 ignores the signal of the CPU limit, so the program is the child of a shell that waits for it.
WAITING = ("sh", "-c", '"$@"; exit $?', "sh")


@dataclass(frozen=True)
class Limits:
    """What one program may use. Benchmarks give 3 seconds on an idle machine; waiting for a busy one costs no CPU time."""

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory_bytes: int = 2 * 2**30  # of addresses
    file_bytes: int = 16 * 2**20  # of each file that it writes


def run_program(source: str, limits: Limits | None = None) -> str:
    """How a Python program ended: PASSED, OUT_OF_TIME, or what stopped it, such as `AssertionError`.

    It has passed if it came to its end without an exception; leaving early does not count. When this returns, no
    process of the program is left: its namespace has ended, or, where there are none, its process group.
    """
    limits = limits or Limits()
    secret = secrets.token_hex(16)
    order = {"source": source, "secret": secret, **limits.__dict__}
    with tempfile.TemporaryDirectory(prefix="partinfer-program-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [*namespaces(), sys.executable, "-I", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            answer, _ = process.communicate(json.dumps(order).encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME
        finally:
            _end(process)
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return OUT_OF_TIME
    word = answer.decode(errors="replace")
    return PASSED if word == secret else word or f"ended with code {process.returncode}"


def _end(process: subprocess.Popen) -> None:
    """Kill what is left of a process and its group, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()


@cache
def namespaces() -> tuple[str, ...]:
    """The command that gives a program its own namespaces; empty where the system has none for this user."""
    if shutil.which(NAMESPACES[0]) is None:
        return ()
    done = subprocess.run([*NAMESPACES, *WAITING, "true"], capture_output=True, check=False)
    return (*NAMESPACES, *WAITING) if done.returncode == 0 else ()
