"""Experts that are stored one by one, or all in one tensor, and checkpoints that lack some."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model_table import tiny_model
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.weights.parts import part_name, rows_of_part, whole_name
from transformers_patches.weights.safetensors_folder import Checkpoint

IDS = torch.arange(3, 12)[None]
PLACE = "model.layers.1.mlp.experts"


def load(folder, **settings):
    return load_model(folder, PartInferConfig(method="dense", device="cpu", dtype="float32", **settings))


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_both_layouts_are_the_same_model(request, tmp_path, kernels):
    if kernels == "native":
        request.getfixturevalue("native")
    model = tiny_model("qwen3_moe")
    folders = [tmp_path / name for name in ("one by one", "together")]
    for folder, original in zip(folders, (True, False), strict=True):
        model.save_pretrained(folder, save_original_format=original)
    stored = [set(load_file(folder / "model.safetensors")) for folder in folders]
    assert f"{PLACE}.5.up_proj.weight" in stored[0]
    assert f"{PLACE}.gate_up_proj" in stored[1]
    with torch.inference_mode():
        first, second = (load(folder, kernels=kernels).model(IDS).logits for folder in folders)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_missing_expert_is_said(request, tmp_path, kernels):
    if kernels == "native":
        request.getfixturevalue("native")
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[f"{PLACE}.3.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PartInferError, match=rf"{PLACE}.gate_up_proj.*: the checkpoint is incomplete, fetch it again"):
        load(tmp_path, kernels=kernels)


def test_parts_are_rows(tmp_path):
    values = {"flat": torch.arange(12.0).view(6, 2), "deep": torch.arange(24.0).view(2, 3, 4)}
    save_file(values, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name, first, stop, expected in (
        ("flat", 2, 5, values["flat"][2:5]),
        ("deep", 3, 6, values["deep"][1]),
        ("deep", 1, 2, values["deep"][0, 1:2]),
    ):
        part = part_name(name, first, stop)
        assert (whole_name(part), rows_of_part(part)) == (name, slice(first, stop))
        assert checkpoint.shape(part) == expected.shape
        out = torch.empty(expected.shape)
        checkpoint.read_into(part, out)
        assert torch.equal(out, expected)
        rows = torch.empty(1, expected.shape[1])
        checkpoint.read_into(part, rows, torch.tensor([len(expected) - 1]))
        assert torch.equal(rows[0], expected[-1])
    with pytest.raises(PartInferError, match=r"flat\[4:9\] was asked for, but its shape is \(6, 2\)"):
        checkpoint.shape("flat[4:9]")
    assert (whole_name("flat"), rows_of_part("flat")) == ("flat", None)
