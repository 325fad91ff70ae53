"""How fast a file is read past the page cache."""

from __future__ import annotations

import mmap
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THREADS, BLOCK, BLOCKS = 4, 256 * 1024, 192  # as neurons on demand are read, and 48 MB of them


def disk_bandwidth(path: Path) -> float | None:
    """Bytes per second of blocks anywhere in a file, several at a time; None where that can't be measured."""
    size = path.stat().st_size // BLOCK * BLOCK
    if not hasattr(os, "O_DIRECT") or not size:
        return None
    places = random.Random(0).choices(range(0, size, BLOCK), k=BLOCKS)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system that can't
        return None
    try:
        started = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            read = sum(pool.map(lambda place: _read(descriptor, place), places))
        return read / (time.perf_counter() - started)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _read(descriptor: int, place: int) -> int:
    with mmap.mmap(-1, BLOCK) as memory:
        return os.preadv(descriptor, [memory], place)
