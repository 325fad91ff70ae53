"""Memory for the weights of a model: on CPUs in huge pages where the system gives them, which reads up to a fifth faster."""

from __future__ import annotations

import contextlib
import ctypes
import math

import torch

from transformers_patches import kernels
from transformers_patches.weights.mapped_files import ALIGNMENT

# Tensors share blocks, because a huge page is 2 MB and begins at a multiple of that: of a tensor of 8 MB by itself a
# quarter is in small pages. What is left of a block is never touched, so it takes no memory.
BLOCK_BYTES = 256 * 2**20
OWN_BYTES = BLOCK_BYTES // 4  # tensors from this size on have their own


class WeightMemory:
    """Hands out uninitialised tensors. huge_pages: ask for them (needs the native kernels)."""

    def __init__(self, *, huge_pages: bool) -> None:
        self.huge_pages = huge_pages
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._second: dict[object, torch.Tensor] = {}

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
        """One of two [rows, columns] matrices whose rows take turns in memory; the next call for `pair` gives the other.

        Where the same row of both is needed, one of twice the length is read, which memory does faster.
        """
        if pair in self._second:
            return self._second.pop(pair)
        first, self._second[pair] = self.empty((shape[0], 2, shape[1]), dtype, torch.device("cpu")).unbind(1)
        return first


def give_back_freed() -> None:
    """Return what reading weights has freed to the system; C libraries keep some of it otherwise (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
