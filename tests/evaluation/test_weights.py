"""Shares of the decoder layers' bytes."""

from __future__ import annotations

import pytest

from evaluation.weights import block_bytes_fraction
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model
from transformers_patches.weights import by_row


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("kind", ["llama", "smollm2"])  # an embedding of its own, and a tied one
def test_the_dense_model_reads_all_bytes_of_its_layers(tiny_checkpoints, monkeypatch, kind, in_file):
    monkeypatch.setattr(by_row, "SUPPORTED", in_file)
    monkeypatch.setattr(by_row, "LEAST", 0)
    loaded = load_model(tiny_checkpoints[kind], PartInferConfig(method="dense", dtype="float32", device="cpu"))
    assert (loaded.report.bytes_in_file > 0) == (in_file and kind == "llama")
    assert block_bytes_fraction(loaded) == pytest.approx(1, abs=1e-6)
