"""Experts loaded in part against transformers' own models without the neurons that are not loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.expert_files import expert_file
from tests.model_gguf import write_model_gguf
from tests.model_table import LAYERS, tiny_model
from tests.transformers_patches.model_passes import padded_prompts, passes, run
from tests.transformers_patches.sparse.test_experts import SIZE, NaiveExperts, reference_logits
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model

SHAPE = {"start_num": 0, "end_num": LAYERS - 1, "device": "cpu", "dtype": "float32"}
DENSE = {"method": "dense", "use_partial_loading": True}
HIDDEN, COUNT = 32, 6


def without(model: nn.Module, loaded: dict[int, list[torch.Tensor]]) -> nn.Module:
    """The model whose experts have no other neurons than these: the other columns of down are 0."""
    for layer, experts in loaded.items():
        down = model.model.layers[layer].mlp.experts.down_proj
        for expert, neurons in enumerate(experts):
            others = torch.ones(SIZE, dtype=torch.bool)
            others[neurons] = False
            down.data[expert, :, others] = 0
    return model


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_everything_loaded_and_computed_is_transformers_own(request, tmp_path, kernels):
    if kernels == "native":
        request.getfixturevalue("native")
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    settings = {"method": "partinfer", "selection": "up", "compensation": "none", "base_neurons_percent": 1.0}
    whole = {"loaded_neurons_percent": 1.0, "sparsity": 1.0}
    loaded = load_model(tmp_path, PartInferConfig(**settings, **whole, **SHAPE, kernels=kernels), expert_file(model))
    all_passes = passes(*padded_prompts([24], "left"), [1, 1])
    for a, b in zip(run(loaded.model, all_passes), run(model, all_passes), strict=True):
        assert (a - b).abs().max() < 1e-4
    assert loaded.computed_fraction() == 1


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_what_is_not_loaded_counts_as_zero(request, tmp_path, kernels):
    if kernels == "native":
        request.getfixturevalue("native")
    model, share = tiny_model("qwen3_moe"), 0.5
    model.save_pretrained(tmp_path)
    file = expert_file(model)
    settings = PartInferConfig(**DENSE, loaded_neurons_percent=share, **SHAPE, kernels=kernels)
    loaded = load_model(tmp_path, settings, file)
    assert loaded.plan.loaded_fraction == pytest.approx(share)
    counts = [len(neurons) for neurons in loaded.plan.expert_neurons[1]]
    assert sum(counts) == share * COUNT * SIZE
    assert len(set(counts)) > 2  # by use
    all_passes = passes(*padded_prompts([20, 9], "left"), [1, 1])
    real = all_passes[0][1]["attention_mask"].bool()
    ours, expected = run(loaded.model, all_passes), run(without(model, loaded.plan.expert_neurons), all_passes)
    assert (ours[0] - expected[0])[real].abs().max() < 1e-4
    for a, b in zip(ours[1:], expected[1:], strict=True):
        assert (a - b).abs().max() < 1e-4
    whole = load_model(tmp_path, PartInferConfig(method="dense", **SHAPE, kernels=kernels))
    saved = (1 - share) * LAYERS * COUNT * SIZE * 3 * HIDDEN * 4
    assert whole.report.bytes_resident - loaded.report.bytes_resident == saved
    assert loaded.report.bytes_read < whole.report.bytes_read


class SomeExperts(NaiveExperts):
    """The reference, over the neurons that are loaded only."""

    def __init__(self, experts: nn.Module, kept: int, loaded: list[torch.Tensor]) -> None:
        super().__init__(experts, kept)
        self.loaded = loaded

    def expert(self, expert: int, x: torch.Tensor):
        act, up, down, bias = super().expert(expert, x)
        neurons = self.loaded[expert]
        return act[neurons], up[neurons], down[:, neurons], bias


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("lengths", [[24], [20, 9]])
def test_tokens_choose_among_what_is_loaded(request, tmp_path, lengths, kernels):
    if kernels == "native":
        request.getfixturevalue("native")
    model, share, sparsity = tiny_model("qwen3_moe"), 0.6, 0.4
    model.save_pretrained(tmp_path)
    settings = {"method": "partinfer", "selection": "up", "compensation": "none", "sparsity": sparsity}
    choice = PartInferConfig(**settings, **SHAPE, loaded_neurons_percent=share, kernels=kernels)
    loaded = load_model(tmp_path, choice, expert_file(model))
    kept = round((3 * sparsity * SIZE - round(share * SIZE)) / 2)
    assert loaded.plan.experts == dict.fromkeys(range(LAYERS), kept)
    all_passes = passes(*padded_prompts(lengths, "left"), [1, 1, 3])
    makers = iter(loaded.plan.expert_neurons.values())
    expected = reference_logits(model, kept, all_passes, lambda experts, kept: SomeExperts(experts, kept, next(makers)))
    ours, real = run(loaded.model, all_passes), all_passes[0][1]["attention_mask"].bool()
    assert (ours[0] - expected[0])[real].abs().max() < 1e-4
    for a, b in zip(ours[1:], expected[1:], strict=True):
        assert (a - b).abs().max() < 1e-4
    assert 0 < loaded.computed_fraction() < share + 0.3


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_experts_in_part_are_the_same_rows(native, tmp_path, dtype):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "folder")
    write_model_gguf(tmp_path / "tiny.gguf", model)
    file = expert_file(model)
    settings = PartInferConfig(**DENSE, loaded_neurons_percent=0.5, **(SHAPE | {"dtype": dtype}), kernels="native")
    first, second = (load_model(tmp_path / name, settings, file) for name in ("folder", "tiny.gguf"))
    all_passes = passes(*padded_prompts([12], "left"), [1])
    for a, b in zip(run(first.model, all_passes), run(second.model, all_passes), strict=True):
        assert torch.equal(a, b)
    whole = load_model(tmp_path / "folder", PartInferConfig(method="dense", **(SHAPE | {"dtype": dtype})))
    assert first.report.bytes_resident < whole.report.bytes_resident


def test_what_cannot_be_loaded_in_part_is_refused(tmp_path):
    model = tiny_model("gpt_oss")
    model.save_pretrained(tmp_path / "gpt_oss")
    settings = PartInferConfig(**DENSE, loaded_neurons_percent=0.5, **SHAPE)
    with pytest.raises(PartInferError, match="take turns can't be loaded in part: use --loaded_neurons_percent 1"):
        load_model(tmp_path / "gpt_oss", settings, expert_file(model))
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "qwen3_moe")
    with pytest.raises(PartInferError, match="4 layers of 6 experts with 96 neurons, but .* has 4 of 6 with 32"):
        load_model(tmp_path / "qwen3_moe", settings, expert_file(model))
