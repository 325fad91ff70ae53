"""Who writes what: locks that end with their process, and the removal of what killed processes have left behind.

What is being written has a name of its own, `.<name>.<random>.partinfer-partial`, and its writer holds a lock on it. A
file or folder of such a name that nobody holds was left by a process that was killed, and may be removed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from transformers_patches.errors import PartInferError

try:
    import fcntl
except ImportError:  # Windows: nothing is held there, so nothing is taken for a leftover
    fcntl = None

PARTIAL = ".partinfer-partial"
LOCK = ".partinfer-lock"
_RANDOM_BYTES = 4
_MOMENT = 0.2  # seconds; a process that looks for leftovers holds a lock for less


@contextmanager
def exclusive(output: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the right to write an output, a file or a folder, whatever link it is named by.

    While another process holds it: PartInferError, or with `wait`, a line on standard error and waiting. The lock is a
    file beside the output, removed at the end. The lock of a killed process is free.
    """
    place = Path(os.path.realpath(output))
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_name(f".{place.name}{LOCK}")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_MOMENT)
    except Timeout:
        if not wait:
            raise PartInferError(f"another run is writing {output}: wait for it, or give another --output") from None
        print(f"another run is writing {output}: waiting for it (Ctrl-C to give up)", file=sys.stderr)
        lock.acquire()
    try:
        clear_leftovers(place.parent)
        yield
    finally:
        path.unlink(missing_ok=True)  # while still held: a process that has opened it meanwhile notices that it is gone
        lock.release()


@contextmanager
def partial(place: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new empty file, or folder, beside `place`, held until the end of the block, and removed if it is still there.

    Its mode follows the umask.
    """
    while True:
        path = place.with_name(f".{place.name}.{secrets.token_hex(_RANDOM_BYTES)}{PARTIAL}")
        descriptor = _made(path, folder=folder)
        if descriptor is not None:
            break
    try:
        yield path
    finally:
        _remove(path)
        os.close(descriptor)


def _made(path: Path, *, folder: bool) -> int | None:
    """Make a file or folder, lock it, and return its descriptor; None if another process took it for a leftover."""
    if folder:
        os.mkdir(path)
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return None


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes have left unfinished in a folder. What a running process holds stays."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith((PARTIAL, LOCK)) and not entry.is_symlink():
                with suppress(OSError):
                    _clear(Path(entry.path))


def _clear(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: somebody holds it
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            _remove(path)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
