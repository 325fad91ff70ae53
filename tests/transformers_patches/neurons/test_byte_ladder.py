"""ByteLadder: what it predicts and chooses between rungs, how a neuron file keeps it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from tests.conftest import FAMILY_CONFIGS, HIDDEN, LAYERS, random_neuron_file
from tests.transformers_patches.made_up_files import made_up_ladder
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.byte_ladder import INPUTS, ByteLadder, Rung
from transformers_patches.neurons.neuron_file import NeuronFile, has_loss_curve


def test_losses_are_interpolated_and_fewer_bytes_never_cost_less():
    ladder = made_up_ladder()
    assert [ladder.predict(share) for share in (1.0, 0.9, 0.8)] == pytest.approx([0.0, 0.01, 0.02])
    assert ladder.predict(0.5) == pytest.approx(0.18)
    assert ladder.predict(0.39) is None
    noisy = made_up_ladder({0.8: 0.05, 0.6: 0.03})
    assert noisy.predict(0.6) == pytest.approx(0.05)


def test_the_larger_of_nll_and_divergence_counts():
    assert Rung(0.5, -0.1, 0.03).loss == 0.03
    assert Rung(0.5, -0.1, -0.03).loss == 0.0


@pytest.mark.parametrize(("bound", "share"), [(0.0, 1.0), (0.02, 0.8), (0.04, 0.7), (0.06, 0.6), (9.0, 0.4)])
def test_the_fewest_bytes_within_a_bound(bound, share):
    assert made_up_ladder().bytes_for(bound + 1e-9) == pytest.approx(share)


def test_a_rung_is_what_is_stored():
    ladder = made_up_ladder()
    choice = ladder.layer(0.6, 2)
    assert [choice.inputs[name].threshold for name in INPUTS] == [1.0] * 3
    assert (choice.neuron_threshold, choice.down_threshold) == (1.0, 1.0)
    assert choice.neurons == pytest.approx(0.8)
    for name in INPUTS:
        assert torch.equal(choice.inputs[name].mean, ladder.mean[name][2].float())
        assert torch.equal(choice.inputs[name].norm, ladder.norm[name][2].float())
    assert ladder.layer(0.1, 0).down_threshold == 2.0  # the last rung


def test_between_rungs_logarithms_are_interpolated():
    choice = made_up_ladder().layer(0.5, 0)
    assert choice.inputs["ffn"].threshold == pytest.approx(2**0.5)
    assert choice.neurons == pytest.approx(0.7)


def test_towards_everything_thresholds_fall_to_zero():
    ladder = made_up_ladder()
    assert ladder.layer(0.7, 0).inputs["ffn"].threshold == pytest.approx(0.5)  # between "everything" and 1
    assert ladder.layer(0.9, 0).down_threshold == pytest.approx(0.25)
    assert ladder.layer(0.8, 0).inputs["ffn"].threshold < 0
    assert ladder.layer(0.9, 0).inputs["ffn"].threshold < 0
    whole = ladder.layer(1.0, 0)
    assert whole.down_threshold < 0
    assert whole.neuron_threshold < 0
    assert whole.neurons == 1


def test_a_neuron_file_keeps_its_ladder_and_stays_small(tmp_path):
    neurons = random_neuron_file(1)
    neurons.save(tmp_path / "none.safetensors")
    neurons.ladder = made_up_ladder()
    neurons.save(tmp_path / "own.safetensors")
    again = NeuronFile.load(tmp_path / "own.safetensors")
    assert again.ladder.rungs == neurons.ladder.rungs
    assert again.ladder.tensors().keys() == neurons.ladder.tensors().keys()
    for name, values in neurons.ladder.tensors().items():
        assert torch.equal(again.ladder.tensors()[name], values)
    assert again.ladder.mean["ffn"].dtype == torch.float16
    assert has_loss_curve(tmp_path / "own.safetensors")
    assert not has_loss_curve(tmp_path / "none.safetensors")
    assert not {"ladder_rungs"} & again.metadata.keys()


def test_a_ladder_of_another_model_is_refused():
    neurons = random_neuron_file(1)
    with pytest.raises(PartInferError, match="byte ladder is of another model"):
        NeuronFile(neurons.ranking, ladder=made_up_ladder(layers=LAYERS + 1))
    config = LlamaConfig(**FAMILY_CONFIGS["llama"][1])
    NeuronFile(neurons.ranking, ladder=made_up_ladder()).check_fits(config, None, "tiny")
    with pytest.raises(PartInferError, match=f"ladder.mean.attention of {HIDDEN + 1} columns"):
        NeuronFile(neurons.ranking, ladder=made_up_ladder(hidden=HIDDEN + 1)).check_fits(config, None, "tiny")


@pytest.mark.parametrize(
    "described",
    ["{", "[]", "[1]", "[" * 5000, '[{"nll": 1}]', "null", '[{"block_bytes": 1.5, "nll": 0, "kl": 0}]'],
    ids=["cut", "empty", "number", "deep", "fields", "null", "share"],
)
def test_damaged_descriptions_are_refused(described):
    with pytest.raises(PartInferError, match="own.safetensors: its byte ladder is damaged"):
        ByteLadder.read(described, made_up_ladder().tensors(), "own.safetensors")


def test_rungs_in_the_wrong_order_are_refused():
    ladder = made_up_ladder()
    rungs = json.dumps(json.loads(ladder.described())[::-1])
    with pytest.raises(PartInferError, match="fewer and fewer bytes"):
        ByteLadder.read(rungs, ladder.tensors(), "own.safetensors")


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("norm.ffn", torch.full((LAYERS, HIDDEN), -1.0), "below 0"),
        ("norm.ffn", torch.ones(LAYERS, HIDDEN + 1), "differ in shape"),
        ("mean.attention", torch.full((LAYERS, HIDDEN), torch.nan), "NaN"),
        ("mean.attention", torch.ones(LAYERS, HIDDEN, dtype=torch.int32), "expected floats"),
        ("threshold.down", torch.ones(2, LAYERS), "expected thresholds of 3 rungs"),
        ("threshold.down", torch.ones(3), "two dimensions"),
        ("neurons", torch.full((3, LAYERS), 1.5), "no shares"),
        ("neurons", None, "neurons"),
    ],
)
def test_damaged_tensors_are_refused(name, values, reason):
    ladder = made_up_ladder()
    tensors = ladder.tensors() | {name: values}
    if values is None:
        del tensors[name]
    with pytest.raises(PartInferError, match=reason):
        ByteLadder.read(ladder.described(), tensors, "own.safetensors")


def test_rungs_are_replaced_by_measured_ones():
    ladder = made_up_ladder()
    again = replace(ladder, rungs=[replace(rung, nll=1.0) for rung in ladder.rungs])
    assert again.predict(0.8) == 1.0
