"""A setting by what it may cost: what is chosen, what is predicted, and what can't be given together."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import random_neuron_file
from tests.transformers_patches.neurons.test_loss_curve import curve
from transformers_patches.config import PartInferConfig, check_given, chooses_nothing
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.max_loss import predicted_loss, within_max_loss
from transformers_patches.plan.neuron_files import settings_for


def with_curve() -> NeuronFile:
    neurons = random_neuron_file(1)
    neurons.loss = curve()
    return neurons


def test_a_bound_loads_everything_and_reads_the_least_that_keeps_it():
    chosen = within_max_loss(PartInferConfig(max_loss=0.1), with_curve(), 6)
    assert (chosen.loaded_neurons_percent, chosen.sparsity, chosen.start_num, chosen.end_num) == (1.0, 0.6, 0, 5)
    assert (chosen.selection, chosen.compensation, chosen.token_count) == ("up", "none", "average")


def test_a_bound_that_nothing_keeps_is_dense():
    assert within_max_loss(PartInferConfig(max_loss=0.0), with_curve(), 6).sparsity == 1.0


@pytest.mark.parametrize("base", [None, random_neuron_file(1)], ids=["no file", "no curve"])
def test_a_bound_needs_a_curve(base):
    with pytest.raises(PartInferError, match="python -m profiler loss"):
        within_max_loss(PartInferConfig(max_loss=0.1), base, 6)


def test_a_bound_and_fractions_contradict_each_other():
    with pytest.raises(PartInferError, match="--max_loss decides about --sparsity: give one of them"):
        check_given({"max_loss": 0.1, "sparsity": 0.4})
    with pytest.raises(PartInferError, match="max_loss must be at least 0"):
        PartInferConfig(max_loss=-1.0)
    with pytest.raises(PartInferError, match="max_loss must be at least 0"):
        PartInferConfig(max_loss=float("nan"))


def test_who_chooses_gets_no_bound_by_default():
    assert chooses_nothing({"device": "cpu", "method": "partinfer"})
    assert not chooses_nothing({"sparsity": 0.4})
    assert not chooses_nothing({"method": "dense"})
    assert not chooses_nothing({"max_loss": 0.1})


def test_predicted_loss():
    whole = within_max_loss(PartInferConfig(max_loss=0.1), with_curve(), 6)
    assert predicted_loss(whole, curve(), 6) == pytest.approx(0.1)
    assert predicted_loss(PartInferConfig(method="dense"), curve(), 6) == 0.0
    original = PartInferConfig(selection="core", compensation="none", budget="uniform")
    assert predicted_loss(original, curve(), 6) == pytest.approx(1.0)
    assert predicted_loss(original, None, 6) is None
    assert (
        predicted_loss(PartInferConfig(selection="core", budget="uniform", start_num=1, end_num=2), curve(), 6) is None
    )


def test_the_program_chooses_by_the_curve_where_there_is_one(tiny_checkpoint_with_files):
    folder = tiny_checkpoint_with_files(with_curve())
    assert settings_for(folder, {}, "QA").max_loss == 0.05
    given = settings_for(folder, {"sparsity": 0.4}, "QA")
    assert (given.max_loss, given.loaded_neurons_percent) == (None, 0.7)


def test_without_a_curve_the_documented_fractions_hold(tiny_checkpoint_with_files):
    chosen = settings_for(tiny_checkpoint_with_files(random_neuron_file(1)), {}, "QA")
    assert (chosen.max_loss, chosen.loaded_neurons_percent, chosen.sparsity) == (None, 0.7, 0.4)


def test_without_neuron_files_everything_is_loaded_and_runs(tiny_checkpoint_with_files):
    folder = tiny_checkpoint_with_files(None)
    chosen = settings_for(folder, {"device": "cpu"}, "QA")
    assert (chosen.loaded_neurons_percent, chosen.selection) == (1.0, "up")
    loaded = load_model(folder, chosen)
    ids = torch.randint(3, 120, (1, 12))
    loaded.model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert loaded.plan.loaded_fraction == 1.0
    assert 0.55 < loaded.bytes_fraction() < 0.85


@pytest.fixture
def tiny_checkpoint_with_files(tmp_path, monkeypatch):
    """A tiny model in a folder of its own, with this QA neuron file or none where neuron files are looked up."""
    from tests.conftest import make_tiny_checkpoint

    monkeypatch.chdir(tmp_path)

    def make(neurons: NeuronFile | None):
        folder = make_tiny_checkpoint(tmp_path / "models" / "own", "llama")
        if neurons is not None:
            (tmp_path / "neuron_files" / "own").mkdir(parents=True)
            neurons.save(tmp_path / "neuron_files" / "own" / "qa.safetensors")
        return folder

    return make
