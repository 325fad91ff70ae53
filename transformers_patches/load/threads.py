"""Whether OpenMP gives PyTorch the threads it counts on: if not, 16-bit products leave part of their result unset."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import numpy as np
import torch

from transformers_patches.errors import PartInferError

logger = logging.getLogger(__name__)

TOKENS, INPUTS, OUTPUTS = 32, 256, 512  # of a product that PyTorch shares among threads, and that takes 1 ms


def check_threads(device: torch.device, dtype: torch.dtype) -> None:
    """Where 16-bit products on the CPU need it, compute with as many threads as there really are, and say so.

    Lowers PyTorch's number of threads for the whole process. Raises PartInferError if products are wrong even with one.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return
    wanted = torch.get_num_threads()
    torch.set_num_threads(min(wanted, _given_threads(wanted)))
    while not _product_is_right(dtype):
        if torch.get_num_threads() == 1:
            raise PartInferError(f"PyTorch's {dtype} products are wrong on this machine: use --dtype float32")
        torch.set_num_threads(torch.get_num_threads() // 2)
    if torch.get_num_threads() < wanted:
        logger.warning(
            "OpenMP does not give all of the %d threads that PyTorch counts on: computing with %d "
            "(OMP_THREAD_LIMIT, OMP_DYNAMIC and OMP_MAX_ACTIVE_LEVELS lower them: unset them)",
            wanted,
            torch.get_num_threads(),
        )


def _given_threads(wanted: int) -> int:
    """How many of the wanted threads OpenMP is sure to give; all of them if its library is not found."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    for path in found:
        try:
            library = ctypes.CDLL(str(path))
            # settings of the thread that asks, but all threads begin with the same
            fewer = library.omp_get_dynamic() or library.omp_get_max_active_levels() < 1
            return 1 if fewer else min(wanted, library.omp_get_thread_limit())
        except (OSError, AttributeError):  # another library whose name is like this
            continue
    return wanted


def _product_is_right(dtype: torch.dtype) -> bool:
    with torch.inference_mode():
        result = torch.nn.functional.linear(_ones(TOKENS, INPUTS, dtype), _ones(OUTPUTS, INPUTS, dtype))
        return bool((result == INPUTS).all())


def _ones(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """torch.ones without threads, which on a busy machine wait for each other longer than all of this takes."""
    one = torch.ones(1, dtype=dtype).view(torch.int16).item()
    return torch.from_numpy(np.full((rows, columns), one, dtype=np.int16)).view(dtype)
