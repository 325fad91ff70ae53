"""Weights that are used in the page cache, where their file is mapped, and not copied.

They take no memory besides the page cache, which processes share, and a file that is cached already is available at once.
Decoding reads pages of 4 KB up to a fifth slower than huge pages. So a mapping is used only if the system backs it with huge
pages, as Linux 6.18 does on ext4 (though not for files written a moment ago). Otherwise files are read.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from pathlib import Path

import torch

from transformers_patches.errors import PartInferError

ALIGNMENT = 64  # of weights: a cache line. What straddles two lines is read slower
SWITCH = "PARTINFER_MAPPED"
_HUGE_PAGE = 2 * 2**20
_SAMPLE = 8 * _HUGE_PAGE  # of a file: how it is mapped tells how the rest would be
_MADV_HUGEPAGE, _MADV_POPULATE_READ = 14, 22  # Linux. Python has a name for the first one only
_LIBC = ctypes.CDLL(None, use_errno=True)


class MappedFiles:
    """Files that are mapped when they are first used. The mapping is private: writing to it does not change the file."""

    def __init__(self) -> None:
        self._maps: dict[Path, torch.Tensor | None] = {}

    def tensor(self, path: Path, start: int, nbytes: int) -> torch.Tensor | None:
        """uint8 [nbytes] from byte `start` on, with pages that may not be read yet; None if it is better to read a copy."""
        if start % ALIGNMENT or not nbytes:
            return None
        if path not in self._maps:
            self._maps[path] = _map(path) if os.environ.get(SWITCH, "auto") != "off" else None
        whole = self._maps[path]
        return None if whole is None else whole[start : start + nbytes]

    def holds(self, values: torch.Tensor) -> bool:
        """Whether a tensor is part of one of the mappings."""
        storage = values.untyped_storage().data_ptr()
        return any(whole is not None and storage == whole.data_ptr() for whole in self._maps.values())


def bring(memory: torch.Tensor) -> None:
    """Read the pages of mapped memory, uint8 [n], from disk if they are not in memory yet."""
    first = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = memory.data_ptr() + len(memory) - first
    failed = _madvise(first, size, _MADV_POPULATE_READ) and ctypes.get_errno()
    if failed and failed != errno.EINVAL:  # from Linux before 5.14, which reads pages when they are used
        raise PartInferError(f"weights can't be read: {os.strerror(failed)}; make the pack again")


def forget(path: Path) -> None:
    """Drop a file that was written and synced from the page cache. Read again, it is cached in huge pages."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _madvise(address: int, size: int, advice: int) -> int:
    return _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice))


def _map(path: Path) -> torch.Tensor | None:
    """A file as uint8 [size]; None if the system does not map it in huge pages."""
    size = path.stat().st_size
    if not os.path.exists("/proc/self/smaps") or size < 2 * _SAMPLE:
        return None
    with open(path, "rb") as file:
        whole = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    _madvise(whole.data_ptr(), size, _MADV_HUGEPAGE)
    middle = size // 2
    bring(whole[middle : middle + _SAMPLE])
    return whole if _bytes_in_huge_pages(whole.data_ptr()) >= _SAMPLE // 2 else None


def _bytes_in_huge_pages(address: int) -> int:
    """How many bytes of the file mapping at an address are in huge pages, as the system reports."""
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
            elif inside and line.startswith("FilePmdMapped:"):
                return int(line.split()[1]) * 1024
    return 0
