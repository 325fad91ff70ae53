"""Memory for a model's weights: on CPUs in huge pages, if the system has them, which are read up to 20 % faster."""

from __future__ import annotations

import contextlib
import ctypes
import math
from pathlib import Path

import psutil
import torch

from transformers_patches import kernels
from transformers_patches.weights.mapped_files import ALIGNMENT

# Tensors share blocks, because a huge page is 2 MB and starts at a multiple of 2 MB: an 8 MB tensor allocated by itself
# would have a quarter of its bytes in small pages. The unused end of a block is never touched, so it takes no memory.
BLOCK_BYTES = 256 * 2**20
OWN_BYTES = BLOCK_BYTES // 4  # tensors of at least this size have their own memory


class WeightMemory:
    """Hands out uninitialised tensors.

    huge_pages: whether to ask for huge pages, which needs the native kernels.
    """

    def __init__(self, *, huge_pages: bool) -> None:
        self.huge_pages = huge_pages
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._joined: dict[object, torch.Tensor] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor."""
        if device.type != "cpu" or not self.huge_pages:
            return torch.empty(shape, dtype=dtype, device=device)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes >= OWN_BYTES:
            values = torch.empty(shape, dtype=dtype)
            kernels.advise_huge_pages(values)
            return values
        if self._used + nbytes > len(self._block):
            self._block, self._used = torch.empty(BLOCK_BYTES, dtype=torch.uint8), 0
            kernels.advise_huge_pages(self._block)
        part = self._block[self._used : self._used + nbytes]
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return part.view(dtype).view(shape)

    def empty_paired(self, pair: object, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """One of two [rows, columns] matrices whose rows are interleaved; the next call for `pair` returns the other.

        Where the same row of both is needed, one stretch of twice the length is read, which is faster.
        """
        first = pair not in self._joined
        part = self.empty_joined(pair, shape[0], [shape[1]] * 2, 0 if first else 1, dtype)
        if not first:
            del self._joined[pair]
        return part

    def empty_joined(
        self, group: object, rows: int, widths: list[int], number: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """One of several matrices, [rows, widths[number]], whose rows lie next to each other.

        The calls of a group, one for each number, return parts of one memory.
        """
        if group not in self._joined:
            self._joined[group] = self.empty((rows, sum(widths)), dtype, torch.device("cpu"))
        start = sum(widths[:number])
        return self._joined[group][:, start : start + widths[number]]


def give_back_freed() -> None:
    """Return freed memory to the system after reading weights: glibc would keep some of it. Does nothing elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back_at_once() -> None:
    """From now on return what is freed to the system, for processes with a bound on their memory. glibc only.

    By default glibc raises, with every large block that is freed, the size from which blocks are mappings of their own.
    Activations of prompts then lie between smaller blocks on the heap, which keeps their room: up to 280 MB were seen.
    https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _FREED)
        libc.mallopt(_M_TRIM_THRESHOLD, _FREED)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_FREED = 2**20  # bytes; smaller blocks are reused


def free_memory() -> int:
    """Free main memory in bytes, within the control group's limit if there is one."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
    except OSError:  # not Linux, or no such controller
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))
