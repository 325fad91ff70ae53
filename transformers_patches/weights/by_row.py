"""Weights of which a token needs a few rows only: they stay in their file, mapped in small pages.

That is so for an embedding that is not the output projection, and for the low plane of an output projection that is
screened. A page of 4 KB is in memory once one of its rows has been used; `RowsInFile.give_back` drops those pages again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import torch

from transformers_patches import kernels
from transformers_patches.errors import PartInferError
from transformers_patches.weights.file_state import FileState, changed

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_MAP_FIXED = 0x10  # Linux
LEAST = 2**20  # bytes; smaller weights are not worth a mapping
SUPPORTED = hasattr(mmap, "MADV_RANDOM") and os.path.exists("/proc/self/maps")


class _Part:
    """A stretch of a file in memory, of which the first bytes are a copy. `values`: uint8 [nbytes]."""

    def __init__(self, path: Path, start: int, nbytes: int, held: int) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.state = FileState.of(self.descriptor)
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self.memory = mmap.mmap(self.descriptor, start + nbytes - first, access=mmap.ACCESS_COPY, offset=first)
        self.memory.madvise(mmap.MADV_RANDOM)
        whole = torch.frombuffer(self.memory, dtype=torch.uint8)
        kernels.watch_mapping(self.memory, whole)
        self.copied = (start - first + held) // mmap.PAGESIZE * mmap.PAGESIZE  # whole pages
        if self.copied:
            self._copy(whole, first)
        self.values = whole[start - first :]

    def _copy(self, whole: torch.Tensor, first: int) -> None:
        """Put memory of the process in the place of the first pages, with what they hold."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        place = whole.data_ptr()
        if _LIBC.mmap(place, self.copied, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != place:
            raise PartInferError(f"no memory for {self.copied} bytes of {self.path}")
        kernels.advise_huge_pages(whole[: self.copied])
        view, done = memoryview(whole[: self.copied].numpy()), 0
        while done < self.copied:
            count = os.preadv(self.descriptor, [view[done : done + 2**24]], first + done)
            if not count:
                raise PartInferError(f"{self.path} can't be read (truncated?): fetch the model again")
            done += count

    def give_back(self) -> None:
        self.memory.madvise(mmap.MADV_DONTNEED, self.copied)


class RowsInFile:
    """The weights of a model that stay in their files. nbytes: how much of them is not in memory."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self.nbytes = 0

    def tensor(self, path: Path, start: int, nbytes: int, *, held: int = 0) -> torch.Tensor | None:
        """uint8 [nbytes] from byte `start` on, whose first `held` bytes are in memory; None where that can't be done or is not worth it."""
        if not SUPPORTED or nbytes < LEAST:
            return None
        part = _Part(path, start, nbytes, held)
        self._parts.append(part)
        self.nbytes += nbytes - held
        return part.values

    def check_unchanged(self) -> None:
        """Raise PartInferError if one of the files was written to since."""
        for part in self._parts:
            if FileState.of(part.descriptor) != part.state:
                raise changed(part.path)

    def give_back(self) -> None:
        """Drop the pages that were read. What is needed of them again is read again."""
        for part in self._parts:
            part.give_back()
