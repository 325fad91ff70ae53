"""LossCurve: what it predicts between measured points, what it chooses, and what it refuses to read."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import LAYERS, random_neuron_file
from tests.transformers_patches.made_up_files import made_up_curve as curve
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.loss_curve import ALL, DEFAULT, LossCurve, LossPoint
from transformers_patches.neurons.neuron_file import NeuronFile, has_loss_curve


def test_between_points_losses_are_interpolated_and_dense_costs_nothing():
    measured = curve()
    assert measured.predict("up", ALL, 1.0, 0.8) == pytest.approx(0.02)
    assert measured.predict("up", ALL, 1.0, 0.7) == pytest.approx(0.06)
    assert measured.predict("up", ALL, 1.0, 0.9) == pytest.approx(0.01)
    assert measured.predict("up", ALL, 1.0, 1.0) == 0


def test_the_larger_of_nll_and_divergence_counts():
    points = [LossPoint("up", ALL, 1.0, 0.5, -0.01, 0.03)]
    assert LossCurve(points, torch.ones(1, 2), None).predict("up", ALL, 1.0, 0.5) == pytest.approx(0.03)


def test_what_was_not_measured_is_not_predicted():
    measured = curve()
    assert measured.predict("up", ALL, 1.0, 0.3) is None
    assert measured.predict("up", ALL, 0.7, 0.4) is None
    assert measured.predict("up", DEFAULT, 0.5, 0.4) is None
    assert measured.predict("griffin", DEFAULT, 0.7, 0.4) is None
    assert measured.predict("core", DEFAULT, 0.7, 0.3) is None
    assert measured.predict("core", DEFAULT, 0.7, 0.4) == pytest.approx(1.0)


def test_partial_loading_lies_between_what_was_loaded():
    measured = curve()
    assert measured.predict("up", DEFAULT, 0.7, 0.35) == pytest.approx(0.7)
    half = measured.predict("up", DEFAULT, 0.85, 0.425)  # half of what is loaded, like 0.35 of 0.7 and 0.5 of 1
    assert half == pytest.approx((0.7 + 0.2) / 2)


def test_a_smaller_share_never_costs_less():
    noisy = curve({0.8: 0.05, 0.6: 0.03, 0.4: 0.5})
    assert noisy.predict("up", ALL, 1.0, 0.6) == pytest.approx(0.05)


@pytest.mark.parametrize(("bound", "share"), [(0.0, 1.0), (0.02, 0.8), (0.06, 0.7), (0.1, 0.6), (9.0, 0.4)])
def test_the_smallest_share_within_a_bound(bound, share):
    assert curve().sparsity_for(bound) == pytest.approx(share)


def test_thresholds_are_interpolated_geometrically():
    measured = curve()
    assert measured.thresholds_for(0.8).tolist() == pytest.approx([1.0] * LAYERS)
    assert measured.thresholds_for(0.7).tolist() == pytest.approx([2**0.5] * LAYERS)
    assert measured.thresholds_for(0.9) is None


def test_a_neuron_file_keeps_its_curve(tmp_path):
    neurons = random_neuron_file(1)
    neurons.loss = curve()
    neurons.save(tmp_path / "own.safetensors")
    again = NeuronFile.load(tmp_path / "own.safetensors")
    assert again.loss.points == neurons.loss.points
    assert torch.equal(again.loss.thresholds, neurons.loss.thresholds)
    assert torch.equal(again.loss.gate_size, neurons.loss.gate_size)
    assert has_loss_curve(tmp_path / "own.safetensors")
    random_neuron_file(1).save(tmp_path / "none.safetensors")
    assert not has_loss_curve(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "described",
    ["{", "[]", "[1]", "[" * 5000, '[{"selection": "up"}]', "null"],
    ids=["cut", "empty", "number", "deep", "fields", "null"],
)
def test_damaged_descriptions_are_refused(described):
    with pytest.raises(PartInferError, match="own.safetensors: its loss curve is damaged"):
        LossCurve.read(described, curve().tensors(), "own.safetensors")


@pytest.mark.parametrize("change", [{"nll": float("nan")}, {"sparsity": 2}, {"loaded": "1"}, {"layers": "some"}])
def test_damaged_points_are_refused(change):
    points = json.loads(curve().described())
    points[0] |= change
    with pytest.raises(PartInferError, match="its loss curve is damaged"):
        LossCurve.read(json.dumps(points), curve().tensors(), "own.safetensors")


def test_tensors_that_do_not_fit_are_refused():
    damaged = {"thresholds": torch.full((3, LAYERS), torch.nan)}
    with pytest.raises(PartInferError, match="thresholds has NaN or Inf"):
        LossCurve.read(curve().described(), damaged, "own.safetensors")
    with pytest.raises(PartInferError, match="expected thresholds for 3 points"):
        LossCurve.read(curve().described(), {"thresholds": torch.ones(2, LAYERS)}, "own.safetensors")
    neurons = random_neuron_file(1, LAYERS + 1)
    with pytest.raises(PartInferError, match="of another model"):
        NeuronFile(neurons.ranking, loss=curve())
