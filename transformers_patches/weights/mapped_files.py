"""Weights that stay where they lie in a file: its pages of the page cache, mapped, instead of copies of them.

They cost no memory beside the page cache, which processes share, and a file that is in it is there at once. Pages of 4 KB are
read up to a fifth slower while decoding, so a mapping is used only where the system backs it with huge pages, as Linux 6.18
does on ext4, but for files that were written a moment ago. Elsewhere files are read.
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

ALIGNMENT = 64  # of weights, a line of the caches: what straddles two is read slower
SWITCH = "PARTINFER_MAPPED"
_HUGE_PAGE = 2 * 2**20
_SAMPLE = 8 * _HUGE_PAGE  # of a file, which tells how the rest would be mapped
_MADV_HUGEPAGE, _MADV_POPULATE_READ = 14, 22  # Linux; Python names the first one only
_LIBC = ctypes.CDLL(None, use_errno=True)


class MappedFiles:
    """Files that are mapped at first use, privately: writing to them changes memory only."""

    def __init__(self) -> None:
        self._maps: dict[Path, torch.Tensor | None] = {}

    def tensor(self, path: Path, start: int, nbytes: int) -> torch.Tensor | None:
        """uint8 [nbytes] from byte `start` on, its pages not yet read; None where reading it somewhere else is better."""
        if start % ALIGNMENT or not nbytes:
            return None
        if path not in self._maps:
            self._maps[path] = _map(path) if os.environ.get(SWITCH, "auto") != "off" else None
        whole = self._maps[path]
        return None if whole is None else whole[start : start + nbytes]

    def holds(self, values: torch.Tensor) -> bool:
        """Whether a tensor lies in one of the files."""
        storage = values.untyped_storage().data_ptr()
        return any(whole is not None and storage == whole.data_ptr() for whole in self._maps.values())


def bring(memory: torch.Tensor) -> None:
    """Read the pages of mapped memory, uint8 [n], from the disk unless they are there."""
    first = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = memory.data_ptr() + len(memory) - first
    failed = _madvise(first, size, _MADV_POPULATE_READ) and ctypes.get_errno()
    if failed and failed != errno.EINVAL:  # which Linux before 5.14 says, and reads pages when they are used
        raise PartInferError(f"weights can't be read: {os.strerror(failed)}; make the pack again")


def forget(path: Path) -> None:
    """Let a file that was written, and synced, leave the page cache: it comes back in large pages."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _madvise(address: int, size: int, advice: int) -> int:
    return _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice))


def _map(path: Path) -> torch.Tensor | None:
    """A file as uint8 [size], if it is mapped in huge pages."""
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
    """Of the file mapping that holds an address, as the system tells."""
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
            elif inside and line.startswith("FilePmdMapped:"):
                return int(line.split()[1]) * 1024
    return 0
