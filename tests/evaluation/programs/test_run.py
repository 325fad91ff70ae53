"""Generated programs: right, wrong, endless, memory-eating and forking ones, and what they leave behind."""

from __future__ import annotations

import time

import psutil
import pytest

from evaluation.programs import run
from evaluation.programs.run import OUT_OF_TIME, PASSED, Limits, run_program

LIMITS = Limits(cpu_seconds=1, wall_seconds=10.0, memory_bytes=2**28)
ESCAPE = """
import os
if os.fork() == 0:
    os.setsid()
    os.execvp("sleep", ["sleep", "4242"])
os.write(1, b"started")
"""


@pytest.mark.parametrize(
    "source, outcome",
    [
        ("def f(x):\n    return x\nassert f(2) == 2", PASSED),
        ("print('x' * 10**7)", PASSED),
        ("open('note', 'w').write('text')\nassert open('note').read() == 'text'", PASSED),
        ("if __name__ == '__main__':\n    raise ValueError", PASSED),
        ("assert 1 == 2", "AssertionError"),
        ("x =", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "ended with code 0"),
        ("def f(x):\n    return f(x)\nf(1)", "RecursionError"),
        ("x = [0] * 10**10", "MemoryError"),
        ("x = []\nwhile True:\n    x.append(bytearray(10**6))", "MemoryError"),
        ("input()", "EOFError"),
    ],
)
def test_how_a_program_ends(source, outcome):
    assert run_program(source, LIMITS) == outcome


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.fork()",
        "import os\nos.system('true')",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import socket\nsocket.socket()",
        "import ctypes\nctypes.CDLL('libc.so.6')",
        "open('../note', 'w')",
        "import os\nos.chdir('/')\nopen('note', 'w')",
        "import os\nos.rmdir('/tmp')",
    ],
)
def test_what_a_program_may_not_do(source):
    assert run_program(source, LIMITS) == "PermissionError"


@pytest.mark.parametrize("waits_in", ["namespaces", "a process group"])
def test_endless_programs_are_ended(waits_in, monkeypatch):
    if waits_in == "a process group":
        monkeypatch.setattr(run, "namespaces", lambda: ())
    started = time.monotonic()
    assert run_program("while True:\n    pass", Limits(cpu_seconds=1, wall_seconds=60.0)) == OUT_OF_TIME
    assert time.monotonic() - started < 30  # by its CPU time
    assert run_program("import time\ntime.sleep(100)", Limits(wall_seconds=1.0)) == OUT_OF_TIME
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass"
    assert run_program(stubborn, Limits(cpu_seconds=1, wall_seconds=60.0)) == OUT_OF_TIME


def test_no_process_is_left(tmp_path, monkeypatch):
    if not run.namespaces():
        pytest.skip("this system gives no namespaces to this user")
    (tmp_path / "child.py").write_text(ESCAPE, encoding="utf-8")
    monkeypatch.setattr(run, "CHILD", tmp_path / "child.py")
    assert run_program("", LIMITS) in ("started", OUT_OF_TIME)
    assert not [process for process in psutil.process_iter(["cmdline"]) if "4242" in (process.info["cmdline"] or [])]


def test_its_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(run.tempfile, "tempdir", str(tmp_path))
    assert run_program("open('note', 'w').write('text')", LIMITS) == PASSED
    assert list(tmp_path.iterdir()) == []
