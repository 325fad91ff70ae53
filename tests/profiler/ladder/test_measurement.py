"""Measured losses of a byte ladder, and who gets none."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from profiler.expected_loss import expectation, ladder_of, measure_ladder
from profiler.ladder.measurement import measured
from profiler.loss_measurement import ScoredText
from profiler.placement import ProfiledModel
from tests.conftest import LAYERS
from tests.transformers_patches.made_up_files import made_up_ladder, with_statistics
from tests.transformers_patches.neurons.test_loss_curve import curve

TEXTS = [ScoredText(list(range(3, 40)), list(range(50, 62))), ScoredText(list(range(90, 60, -1)), list(range(20, 28)))]


def neurons_with_ladder():
    neurons = with_statistics(1)
    neurons.ladder = made_up_ladder()
    return neurons


def test_every_rung_is_scored_against_everything_over_all_texts(tiny_checkpoints, monkeypatch):
    """With choices that change the output projection: the fewer neurons, the more of it is gone."""
    seen = []

    def set_layer_choices(loaded, choices):
        head = loaded.model.get_output_embeddings()
        if not seen:
            head.whole = head.weight.detach().clone()
        seen.append(choices)
        head.weight.data.copy_(head.whole * choices[0].neurons)

    monkeypatch.setattr("profiler.ladder.measurement.set_layer_choices", set_layer_choices)
    settings = {"dtype": "float32", "device": "cpu"}
    neurons = neurons_with_ladder()
    ladder = measured(neurons, tiny_checkpoints["llama"], settings, TEXTS, quiet=True)
    assert len(seen) == len(TEXTS) * 4
    assert all(len(choices) == LAYERS for choices in seen)
    assert seen[0][0].neuron_threshold < 0
    divergences = [rung.kl for rung in ladder.rungs]
    assert divergences[0] == pytest.approx(0, abs=1e-6)  # all neurons
    assert 1e-4 < divergences[1] < divergences[2]
    assert [r.block_bytes for r in ladder.rungs] == [r.block_bytes for r in neurons.ladder.rungs]
    assert torch.equal(ladder.thresholds["down"], neurons.ladder.thresholds["down"])


def test_choices_are_followed_and_what_reads_everything_costs_nothing(tiny_checkpoints):
    arguments = Namespace(checkpoint_path=tiny_checkpoints["llama"], dtype="float32", device="cpu", quiet=True)
    neurons = neurons_with_ladder()
    whole = {name: torch.full_like(values, -1.0) for name, values in neurons.ladder.thresholds.items()}
    neurons.ladder = replace(neurons.ladder, thresholds=whole, neurons=torch.ones_like(neurons.ladder.neurons))
    assert all(rung.kl < 1e-6 for rung in measure_ladder(arguments, neurons, TEXTS).rungs)
    neurons = neurons_with_ladder()
    measured_ladder = measure_ladder(arguments, neurons, TEXTS)
    assert all(rung.kl > 1e-6 for rung in measured_ladder.rungs)
    neurons.ladder = None
    assert measure_ladder(arguments, neurons, TEXTS) is None


def test_plain_ffns_get_no_ladder_and_a_note(tiny_checkpoints, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints["opt"]).eval()
    capsys.readouterr()
    assert ladder_of(Namespace(quiet=False), ProfiledModel("opt", "0", model, None), TEXTS) is None
    assert capsys.readouterr().err.startswith("no byte ladder: opt has plain FFNs")
    assert ladder_of(Namespace(quiet=True), ProfiledModel("opt", "0", model, None), TEXTS) is None
    assert capsys.readouterr().err == ""


def test_what_to_expect_is_a_table():
    lines = expectation(curve(), made_up_ladder()).splitlines()
    assert lines[0].split("  ")[0] == "bytes of all decoder layers a token reads"
    assert lines[1].split() == ["80.0%", "0.020", "0.020", "0.010"]
    assert lines[4] == "bytes of all decoder layers read at --max_loss 0.02: 80%, 0.05: 65%, 0.1: 57%"
