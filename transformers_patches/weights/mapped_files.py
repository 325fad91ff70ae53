"""Weights that are used in the page cache, where their file is mapped, and not copied.

They take no memory besides the page cache, which processes share, and a file that is cached already is available at
once. Decoding reads pages of 4 KB up to 20 % slower than huge pages. So a mapping is used only if the system backs it
with huge pages, as Linux 6.18 does on ext4 (though not for files written a moment ago). Otherwise files are read.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import weakref
from pathlib import Path

import torch

from transformers_patches import kernels
from transformers_patches.errors import PartInferError
from transformers_patches.weights.file_state import FileState, changed

ALIGNMENT = 64  # of weights: a cache line, because values that straddle two lines are read more slowly
SWITCH = "PARTINFER_MAPPED"
_HUGE_PAGE = 2 * 2**20
_SAMPLE = 8 * _HUGE_PAGE  # of a file: the rest would be mapped as this part is
_MADV_HUGEPAGE, _MADV_POPULATE_READ = 14, 22  # Linux. Python has a name for the first one only
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Mapping:
    """A file in memory, uint8 [size], and the file itself, still open: by name it might be another one later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.state = FileState.of(self.descriptor)
        self.memory = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_COPY)
        self.whole = torch.frombuffer(self.memory, dtype=torch.uint8)


class MappedFiles:
    """Files that are mapped when they are first used. The mapping is private: writing to it does not change the file.

    But writing to the file may change the mapping, and pages behind the end of a file that was cut off can't be read:
    `check_unchanged` finds out both. A file that is cut off after that, while the weights are in use, ends the process
    with a line that says so (and exit code 1).
    """

    def __init__(self) -> None:
        self._maps: dict[Path, _Mapping | None] = {}

    def tensor(self, path: Path, start: int, nbytes: int) -> torch.Tensor | None:
        """uint8 [nbytes] from byte `start` on, whose pages may not be read yet; None if reading a copy is better."""
        if start % ALIGNMENT or not nbytes:
            return None
        if path not in self._maps:
            self._maps[path] = _map(path) if os.environ.get(SWITCH, "auto") != "off" else None
        mapping = self._maps[path]
        return None if mapping is None else mapping.whole[start : start + nbytes]

    def check_unchanged(self) -> None:
        """Raise PartInferError if a mapped file was written to since it was mapped. Takes a microsecond per file.

        A path that leads to another file by now does not matter: the mapped one stays as it was.
        """
        for mapping in self._maps.values():
            if mapping is not None and FileState.of(mapping.descriptor) != mapping.state:
                raise changed(mapping.path)

    def holds(self, values: torch.Tensor) -> bool:
        """Whether a tensor is part of one of the mappings."""
        storage = values.untyped_storage().data_ptr()
        return any(m is not None and storage == m.whole.data_ptr() for m in self._maps.values())


def bring(memory: torch.Tensor) -> None:
    """Read the pages of mapped memory, uint8 [n], from disk if they are not in memory yet."""
    first = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = memory.data_ptr() + len(memory) - first
    failed = _madvise(first, size, _MADV_POPULATE_READ) and ctypes.get_errno()
    if failed and failed != errno.EINVAL:  # from Linux before 5.14: pages are then read when they are used
        raise PartInferError(f"weights can't be read: {os.strerror(failed)}; make the pack again")


def forget(path: Path) -> None:
    """Drop a file that was written and synced from the page cache. Read again, it is cached in huge pages."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _madvise(address: int, size: int, advice: int) -> int:
    return _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice))


def _map(path: Path) -> _Mapping | None:
    """A file in memory; None if the system does not map it in huge pages."""
    size = path.stat().st_size
    if not os.path.exists("/proc/self/smaps") or size < 2 * _SAMPLE:
        return None
    mapping = _Mapping(path)
    address, middle = mapping.whole.data_ptr(), size // 2
    _madvise(address, size, _MADV_HUGEPAGE)
    bring(mapping.whole[middle : middle + _SAMPLE])
    if _bytes_in_huge_pages(address) < _SAMPLE // 2:
        return None
    kernels.watch_mapping(mapping.memory, mapping.whole)
    return mapping


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
