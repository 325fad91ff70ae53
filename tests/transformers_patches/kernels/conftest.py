"""Every kernel test runs once per variant that this processor can run, and once in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels.library import LIBRARY

VARIANTS = ["reference", "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_dotprod"]


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    """The variant in use during a test; skipped where the processor or the compiler lacks it."""
    if request.param == "reference":
        monkeypatch.setattr(LIBRARY, "ops", None)
        monkeypatch.setattr(LIBRARY, "loaded", True)
        yield request.param
    elif request.param not in kernels.variants():
        pytest.skip(f"no {request.param} kernels here {kernels.why_not()}")
    else:
        with kernels.use_variant(request.param):
            yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
