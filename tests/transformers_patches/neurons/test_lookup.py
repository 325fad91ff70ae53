"""Which neuron files are found for a model and a task."""

from __future__ import annotations

import pytest

from transformers_patches.errors import PartInferError
from transformers_patches.neurons import lookup
from transformers_patches.neurons.lookup import TASK_TYPES, find_neuron_files, find_random_neurons
from transformers_patches.neurons.neuron_file import NeuronFile


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the neuron files of some-model are, seen from the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "neuron_files" / "some-model"
    folder.mkdir(parents=True)
    return folder


def names_found(place, task_type):
    found = find_neuron_files([place.name], task_type)
    return tuple(path and path.name for path in (found.dataset, found.model))


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_every_task_type_finds_what_the_profiler_writes_for_it(place, task_type):
    from profiler.commands.run import default_output

    name = default_output(place, task_type).name
    (place / name).touch()
    assert names_found(place, task_type) == (name, None)


@pytest.mark.parametrize(
    ("there", "task_type", "expected"),
    [
        (["qa.safetensors", "qa.json", "model.safetensors"], "QA", ("qa.safetensors", "model.safetensors")),
        (["qa.json", "model_neurons.json"], "QA", ("qa.json", "model_neurons.json")),
        (["translate.json"], "translate_de_en", ("translate.json", None)),
        (["translate.safetensors", "translate_de_en.json"], "translate_de_en", ("translate_de_en.json", None)),
        (["qa.safetensors", "model.safetensors"], "Summarize", (None, "model.safetensors")),
        (["qa.safetensors", "model.safetensors"], None, (None, "model.safetensors")),
    ],
)
def test_own_file_before_group_and_safetensors_before_legacy(place, there, task_type, expected):
    for name in there:
        (place / name).touch()
    assert names_found(place, task_type) == expected


def test_neither_file_is_one_line_that_says_how_to_make_one(place):
    (place / "random.safetensors").touch()
    with pytest.raises(PartInferError, match="no neuron files for some-model .* make one with python -m profiler run"):
        find_neuron_files([place.name], "QA")


def test_the_first_name_with_files_counts(place):
    (place / "qa.safetensors").touch()
    (place / "random.json").touch()
    assert find_neuron_files(["0a1b2c", "some-model"], "QA").dataset.parent.name == "some-model"
    assert find_random_neurons(["0a1b2c", "some-model"]).name == "random.json"
    assert find_random_neurons(["0a1b2c"]) is None


def test_own_files_come_before_those_that_ship(place, tmp_path, monkeypatch):
    shipped = tmp_path / "installed" / "neuron_files" / "some-model"
    shipped.mkdir(parents=True)
    monkeypatch.setattr(lookup, "shipped", lambda name: tmp_path / "installed" / name)
    for name in ("qa.safetensors", "model.safetensors"):
        (shipped / name).touch()
    found = find_neuron_files(["some-model"], "QA")
    assert (found.dataset, found.model) == (shipped / "qa.safetensors", shipped / "model.safetensors")
    (place / "qa.json").touch()
    assert find_neuron_files(["some-model"], "QA").dataset.resolve() == place / "qa.json"


@pytest.mark.parametrize("model", ["SmolLM2-135M-Instruct", "Qwen2.5-Coder-1.5B-Instruct"])
def test_what_ships_for_questions_says_what_leaving_out_costs(model):
    file = NeuronFile.load(find_neuron_files([model], "QA").dataset)
    assert file.metadata["model_name"] == model
    assert 0.3 < file.loss.sparsity_for(0.05) < 0.9
    assert file.loss.sparsity_for(0.02) > file.loss.sparsity_for(0.1)
