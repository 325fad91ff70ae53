"""Reading pieces of files, several at a time and ahead of their use.

One thread that reads block after block leaves a solid-state disk idle most of the time; four keep it busy. Reads go
through the page cache, so a second load comes from memory.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from transformers_patches.errors import PartInferError
from transformers_patches.weights.mapped_files import bring

BLOCK_BYTES = 2 * 2**20  # of one read, or one row if that is longer
MAPPED_BLOCK_BYTES = 16 * 2**20  # of one read where a file is mapped
THREADS = 4
AHEAD = 8  # reads that are under way or done but not taken yet; bounds the memory of their buffers


@dataclass(frozen=True)
class Read:
    """A stretch of a file to be read. Either `into` or `take` says what becomes of its bytes.

    path: the file.
    start: the first byte.
    size: how many bytes.
    into: memory that they are read into.
    mapped: whether `into` is the mapping of the file itself, so that only its pages have to be read.
    floats: name and float type of the tensor that is read, whose values are then checked to be finite; None: no check.
        Of large mapped tensors no values are touched before they are used: that would take as long as reading them, the
        pack's writer has checked them, and a generation whose logits are not finite ends with an error. The small ones
        (norms, biases, scales of quantised rows) are checked.
    take: called with the bytes, uint8 [size], in the caller's thread and in the order of the reads. The buffer is
        reused afterwards.
    """

    path: Path
    start: int
    size: int
    into: torch.Tensor | None = None
    mapped: bool = False
    floats: tuple[str, torch.dtype] | None = None
    take: Callable[[torch.Tensor], None] | None = None


def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Temporary memory that returns to the system when it is dropped; the C library would keep it."""
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size].view(dtype).view(shape)


def after_all(act: Callable[[], None]) -> Read:
    """A read of nothing, which calls `act` when all reads before it have been taken."""
    return Read(Path(os.devnull), 0, 0, take=lambda _: act())


def run(reads: Iterable[Read]) -> None:
    """Do the reads, asking the iterable for only a few at a time.

    Raises PartInferError for files that are too short, and for floats that are not finite.
    """
    running: deque[tuple[Read, torch.Tensor, Future]] = deque()
    free: list[torch.Tensor] = []
    pool = ThreadPoolExecutor(THREADS)
    try:
        for read in reads:
            if len(running) == AHEAD:
                _finish(*running.popleft(), free)
            memory = read.into if read.into is not None else _buffer(free, read.size)
            running.append((read, memory, pool.submit(_read, read, memory)))
        while running:
            _finish(*running.popleft(), free)
    finally:
        pool.shutdown(cancel_futures=True)


def _buffer(free: list[torch.Tensor], size: int) -> torch.Tensor:
    """A free buffer that is long enough, or a new one."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    place = next((place for place, buffer in enumerate(free) if len(buffer) >= size), None)
    return free.pop(place) if place is not None else scratch((max(size, BLOCK_BYTES),), torch.uint8)


def _finish(read: Read, memory: torch.Tensor, future: Future, free: list[torch.Tensor]) -> None:
    future.result()
    if read.take is not None:
        read.take(memory[: read.size])
    if read.into is None and read.size:
        free.append(memory)


def _read(read: Read, memory: torch.Tensor) -> None:
    if read.mapped:
        bring(memory)
        if read.floats is not None and 0 < read.size <= BLOCK_BYTES:
            _check_finite(read, memory[: read.size])
        return
    view = memoryview(memory.numpy())[: read.size]
    try:
        with open(read.path, "rb", buffering=0) as file:
            file.seek(read.start)
            done = 0
            while done < read.size:
                count = file.readinto(view[done:])
                if not count:
                    raise OSError("it ends too early")
                done += count
    except OSError as error:
        raise PartInferError(f"{read.path} can't be read (truncated?): {error}; fetch the model again") from None
    if read.floats is not None and read.size:
        _check_finite(read, memory[: read.size])


def _check_finite(read: Read, memory: torch.Tensor) -> None:
    """Raise PartInferError unless all of the floats are finite. In the reading thread, while the bytes are in the CPU's cache."""
    name, dtype = read.floats
    values = memory.view(dtype)
    # NaN is both the smallest and the largest; this is several times as fast as isfinite()
    ends = (values if dtype.itemsize > 1 else values.float()).aminmax()
    if not all(math.isfinite(end) for end in ends):
        raise PartInferError(
            f"{read.path}: {name} has values that are not finite: the file is damaged, or the training was"
        )
