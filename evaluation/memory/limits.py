"""A limit on the memory of a process: a control group of its own where one can be made, else RLIMIT_DATA."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited(limit: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """What limits: its name, and what a child process calls before it starts its program.

    A control group counts the page cache, too, as far as its processes have read files; its name says the version.
    RLIMIT_DATA counts only memory that belongs to the process.
    """
    group = _make_group(limit)
    if group is None:
        yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return
    kind, folder = group

    def enter() -> None:
        (folder / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield kind, enter
    finally:
        _remove(folder)


def _make_group(limit: int) -> tuple[str, Path] | None:
    name = f"partinfer-{os.getpid()}-{time.monotonic_ns()}"
    for kind, root, file in (
        ("cgroup v1", V1, "memory.limit_in_bytes"),
        ("cgroup v2", V2, "memory.max"),
    ):
        folder = root / name
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / file).write_text(str(limit))
            return kind, folder
        except OSError:  # a hierarchy without the memory controller
            _remove(folder)
    return None


def _remove(folder: Path) -> None:
    """Its process has ended, but the system may take a moment to know it."""
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)


def drop_from_cache(path: Path) -> None:
    """Drop a file, or all of a folder's, from the page cache, so that it is read from disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
