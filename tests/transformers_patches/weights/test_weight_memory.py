"""Memory for weights: rows of two matrices that take turns, and which weights have them."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import random_neuron_file
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model
from transformers_patches.weights.memory import WeightMemory


@pytest.mark.parametrize("huge_pages", [False, True])
def test_rows_of_two_matrices_take_turns(huge_pages, native):
    memory = WeightMemory(huge_pages=huge_pages)
    first, other, second = (memory.empty_paired(pair, (5, 8), torch.bfloat16) for pair in ("a", "b", "a"))
    assert second.data_ptr() - first.data_ptr() == 16  # bytes of a row
    assert first.stride() == second.stride() == (16, 1)
    first.fill_(1), second.fill_(2), other.fill_(3)
    assert [values.unique().tolist() for values in (first, second, other)] == [[1], [2], [3]]


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("selection, turns", [("up", True), ("core", False), ("gate", False)])
def test_gate_and_down_take_turns_where_tokens_choose_by_up(tiny_checkpoints, dtype, selection, turns, native):
    """Whatever the layout, the values are those that are loaded without native kernels."""
    names, loaded = ("gate", "up", "down"), {}
    for kernels in ("native", "torch"):
        settings = PartInferConfig(
            start_num=1, end_num=3, dtype=dtype, kernels=kernels, selection=selection, device="cpu"
        )
        loaded[kernels] = load_model(tiny_checkpoints["llama"], settings, random_neuron_file(1))
    for ours, theirs in zip(loaded["native"].state.layers, loaded["torch"].state.layers, strict=True):
        for name in names:
            held, expected = ours.rows.weight(name), theirs.rows.weight(name)
            parts = (
                [(held, expected)]
                if dtype == "float32"
                else [(held.data, expected.data), (held.scales, expected.scales)]
            )
            for part, wanted in parts:
                assert torch.equal(part, wanted)
                assert part.is_contiguous() == (not turns or name == "up")
    assert loaded["native"].report.bytes_resident == loaded["torch"].report.bytes_resident
