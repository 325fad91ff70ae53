"""Programs that run at the same time, and all end when one fails or the user interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import IO


class CommandFailed(RuntimeError):
    """A program failed; the message is the line of its output that says most."""


def run_all(commands: list[list[str]]) -> None:
    """Run programs, each a list of arguments, as many at a time as there are CPUs. CommandFailed when one fails.

    Then, and when interrupted, those that still run are killed: nothing is waited for.
    """
    waiting, running = list(reversed(commands)), []
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(_start(waiting.pop()))
            process, _ = running[0]
            process.wait()
            for one in [one for one in running if one[0].poll() is not None]:
                running.remove(one)
                _check(*one)
    finally:
        for process, output in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.close()


def _start(command: list[str]) -> tuple[subprocess.Popen, IO[bytes]]:
    output = tempfile.TemporaryFile()  # noqa: SIM115  (closed with its process)
    # a session of its own: killed together with what it has started, and out of reach of the terminal's Ctrl-C
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    ), output


def _check(process: subprocess.Popen, output: IO[bytes]) -> None:
    with output:
        if process.returncode == 0:
            return
        output.seek(0)
        lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    raise CommandFailed(next((line for line in lines if "error" in line), lines[-1] if lines else "it said nothing"))
