"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter, which the conftest of the root asks for."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    collect_ignore_glob = ["test_[!a]*.py"]  # all but test_available.py, which says so


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def large_blocks(monkeypatch):
    """Fewer programs: the interpreter takes milliseconds for each. Tests without it run the sizes that GPUs have."""
    from transformers_patches.kernels.triton import launch

    if not torch.cuda.is_available():
        monkeypatch.setattr(launch, "SLOTS", 256)
        monkeypatch.setattr(launch, "SUMMED_ROWS", 128)
        monkeypatch.setattr(launch, "SUMMED_COLUMNS", 2048)
