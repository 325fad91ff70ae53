"""Whole models whose tokens are decoded by the Triton kernels, as on a GPU: against PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests.transformers_patches.model_passes import DATASET, MODEL, logits
from transformers_patches.config import PartInferConfig
from transformers_patches.kernels import triton
from transformers_patches.kernels.triton import launch
from transformers_patches.load.loader import load_model
from transformers_patches.plan import run as plan_run
from transformers_patches.plan.decision import Decision

from ..helpers import error


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """Names of the kernels that are started, where models on the CPU decode as they would on a GPU."""
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    names, start = [], launch.start
    monkeypatch.setattr(
        launch, "start", lambda kernel, *a, **o: names.append(kernel.fn.__name__) or start(kernel, *a, **o)
    )
    monkeypatch.setattr(triton, "computes_on", lambda device: True)
    return names


@pytest.mark.parametrize(
    ("family", "selection"),
    [("llama", "up"), ("llama", "core"), ("opt", "gate")],
)
def test_models_decode_as_in_pytorch(started, monkeypatch, large_blocks, tiny_checkpoints, family, selection):
    files = {"dataset_neurons": DATASET, "model_neurons": MODEL}
    settings = PartInferConfig(
        device="cpu", dtype="float32", selection=selection, kernels="torch", start_num=1, end_num=2, sparsity=0.4
    )
    expected = logits(load_model(tiny_checkpoints[family], settings, **files))
    assert started == []
    monkeypatch.setattr(plan_run, "decide_kernels", lambda *_: Decision("triton", "as on a GPU"))
    ours = logits(load_model(tiny_checkpoints[family], settings, **files))
    assert {"products_kernel", "sums_kernel"} <= set(started)
    assert ("choose_kernel" in started) == (selection != "core")
    assert error(ours[-1], expected[-1]) < 1e-5
