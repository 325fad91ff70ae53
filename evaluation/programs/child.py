"""The process of one generated program: limits first, then the program, then a word on how it ended.

`run.py` starts this file by its path, in an empty folder, with `python -I`. It reads a JSON object from standard input
and writes one line to standard output: the secret of the object if the program came to its end, else what stopped it.
"""

from __future__ import annotations

import json
import os
import resource
import sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
# Audit events (PEP 578) of what no program of a benchmark needs. Hooks can't be removed by the program.
REFUSED = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "subprocess.", "pty.", "signal."),
    *("socket.", "ctypes.dlopen", "os.chown", "os.setxattr"),
)
# Events whose first arguments are paths that would be changed, and how many of them.
CHANGING = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.utime"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), 2),
}


def main() -> None:
    order = json.load(sys.stdin)
    answer = os.dup(1)
    os.set_inheritable(answer, False)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # a program may print as much as it likes
        os.dup2(null, stream)
    _set_limits(order)
    code = compile("pass", "program", "exec")
    try:
        code = compile(order["source"], "program", "exec")
        _guard(os.path.realpath("."))
        exec(code, {"__name__": "program"})  # not __main__: what stands below such an `if` is no part of the answer
        word = order["secret"]
    except BaseException as error:  # SystemExit, too: a program that leaves has not passed its tests
        word = type(error).__name__
    os.write(answer, word.encode())
    os._exit(0)  # neither threads nor exit handlers of the program hold it up


def _set_limits(order: dict) -> None:
    seconds, memory = order["cpu_seconds"], order["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], order["file_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _guard(folder: str) -> None:
    """Refuse other processes, signals, the network, and changes outside `folder`."""

    def outside(path: object) -> bool:
        if isinstance(path, int):
            return False
        place = os.path.realpath(os.fsdecode(path))
        return place != os.devnull and not place.startswith(folder + os.sep)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            refused = bool(flags & WRITING) and outside(path)
        elif event in CHANGING:
            refused = any(outside(path) for path in arguments[: CHANGING[event]])
        else:
            # a library of None is the interpreter itself, which NumPy asks for
            refused = event.startswith(REFUSED) and not (event == "ctypes.dlopen" and arguments == (None,))
        if refused:
            raise PermissionError(f"a generated program may not do this: {event}")

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
