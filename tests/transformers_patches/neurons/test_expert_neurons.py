"""Which neurons of experts are loaded, and files that say something impossible about them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.expert_files import expert_neurons
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.expert_neurons import LEAST_TOKENS, ExpertNeurons
from transformers_patches.neurons.neuron_file import NeuronFile

COUNT, SIZE = 5, 64


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_the_most_used_mass_is_loaded(share):
    experts = expert_neurons(2, COUNT, SIZE)
    score = "mean_abs_down"
    loaded = experts.loaded(1, share, score)
    assert sum(map(len, loaded)) == round(share * COUNT * SIZE)
    assert all(len(neurons) >= SIZE // 32 and torch.equal(neurons, neurons.unique()) for neurons in loaded)
    mass = experts.statistics["mean_abs"][1].float() * experts.statistics["down_norm"][1].float()
    mass *= experts.tokens[1][:, None]
    inside = torch.zeros(COUNT, SIZE, dtype=torch.bool)
    for expert, neurons in enumerate(loaded):
        inside[expert, neurons] = True
        best = mass[expert].topk(len(neurons)).values.sum()  # of one expert, the best are loaded
        assert mass[expert, neurons].sum() == pytest.approx(float(best))
    beyond = [expert for expert in range(COUNT) if len(loaded[expert]) > SIZE // 32]
    assert mass[~inside].max() <= min(mass[expert][inside[expert]].min() for expert in beyond)


def test_an_expert_that_is_hardly_used_gives_up_its_neurons_first():
    experts = expert_neurons(1, COUNT, SIZE)
    tokens = torch.tensor([[1000, 1000, 1000, 1000, LEAST_TOKENS - 1]])
    loaded = replace(experts, tokens=tokens).loaded(0, 0.8, "mean_abs")
    assert len(loaded[4]) < 0.2 * SIZE
    assert min(map(len, loaded[:4])) > 0.8 * SIZE
    norms = experts.statistics["down_norm"][0, 4].float()  # its order is that of its weights
    assert norms[loaded[4]].min() == norms.topk(len(loaded[4])).values[-1]


def test_everything_is_everything():
    loaded = expert_neurons(1, COUNT, SIZE).loaded(0, 1.0, "griffin")
    assert all(torch.equal(neurons, torch.arange(SIZE)) for neurons in loaded)


def test_scores():
    experts = expert_neurons(1, COUNT, SIZE)
    values = {name: value.float() for name, value in experts.statistics.items()}
    assert torch.equal(experts.scores("rms"), values["rms"])
    assert torch.equal(experts.scores("rms_down"), values["rms"] * values["down_norm"])
    assert torch.equal(experts.scores("std_down"), values["mean_abs"] * values["down_norm"])  # which files don't have


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (1, 0)}, "says about experts is damaged"),
        ({"layers": (0, 3)}, "says about experts is damaged"),
        ({"tokens": torch.zeros(2, COUNT + 1, dtype=torch.int64)}, "says about experts is damaged"),
        ({"tokens": torch.full((2, COUNT), -1)}, "says about experts is damaged"),
        ({"statistics": {}}, "damaged"),
        ({"rms": torch.full((2, COUNT, SIZE), torch.nan)}, "experts.rms has values that are not finite"),
        ({"rms": torch.full((2, COUNT, SIZE), -1.0)}, "experts.rms has numbers below 0"),
    ],
)
def test_damaged_statistics_are_refused(change, message):
    experts = expert_neurons(2, COUNT, SIZE)
    statistics = change.pop("statistics", experts.statistics | ({"rms": change.pop("rms")} if "rms" in change else {}))
    wrong = replace(experts, statistics=statistics, **change)
    with pytest.raises(PartInferError, match=message):
        NeuronFile(torch.zeros(3, 0, dtype=torch.int32), experts=wrong)


def test_files(tmp_path):
    experts = expert_neurons(2, COUNT, SIZE)
    file = NeuronFile(torch.zeros(2, 0, dtype=torch.int32), experts=experts)
    file.save(tmp_path / "it.safetensors")
    again = NeuronFile.load(tmp_path / "it.safetensors").experts
    assert (again.layers, again.shape) == (experts.layers, experts.shape)
    assert all(torch.equal(again.statistics[name], values) for name, values in experts.statistics.items())
    with pytest.raises(PartInferError, match="nothing but experts"):
        file.save(tmp_path / "it.json")
    with pytest.raises(PartInferError, match="its layers with experts are '{'"):
        ExpertNeurons.read("{", experts.tensors(), "it")
