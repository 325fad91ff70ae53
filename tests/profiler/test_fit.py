"""`python -m profiler fit`, end to end on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

from profiler.__main__ import main
from profiler.fitting import Fitter
from transformers_patches.neurons.fit_file import FitFile
from transformers_patches.weights.model_files import read_config

SMALL = ("--task_type", "QA", "--max_new_tokens", "5", "--batch_size", "4", "--start_num", "1", "--end_num", "2")


def run(command: str, model_folder, dataset, *more: str) -> int:
    fixed = [command, "--checkpoint_path", str(model_folder), "--dataset", str(dataset), "--device", "cpu", "--quiet"]
    return main([*fixed, *SMALL[:6], *more])


@pytest.fixture
def neurons(model_folder, questions, tmp_path):
    """A neuron file of the tiny model."""
    path = tmp_path / "qa.safetensors"
    assert run("run", model_folder, questions, "--output", str(path)) == 0
    return path


def fit(model_folder, questions, neurons, *more: str) -> int:
    return run("fit", model_folder, questions, "--neurons", str(neurons), *SMALL[6:], *more)


def test_file_lies_beside_the_neuron_file_and_says_what_it_is_for(model_folder, questions, neurons, capsys):
    capsys.readouterr()
    assert fit(model_folder, questions, neurons, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    path = neurons.with_name("qa.fit.safetensors")
    file = FitFile.load(path)
    assert summary["output"] == str(path)
    assert summary["bytes"] == path.stat().st_size
    assert sorted(file.layers) == [1, 2]
    assert file.loaded_neurons_percent == 0.7
    assert file.metadata["compensation"] == "refit"
    assert len(file.layers[1].neurons) == 34  # 0.7 of 48
    assert file.layers[1].down.shape == (34, 32)
    assert file.metadata["model_name"] == "tiny-llama"
    assert float(file.metadata["error_after"]) < float(file.metadata["error_before"])
    assert sorted(p.name for p in neurons.parent.iterdir()) == ["qa.fit.safetensors", "qa.safetensors"]
    file.check_fits(read_config(model_folder), file.metadata["fingerprint"], "tiny-llama")


def test_the_ranking_decides_when_it_is_asked_to(model_folder, questions, neurons):
    from transformers_patches.neurons.neuron_file import NeuronFile

    assert fit(model_folder, questions, neurons, "--choose", "ranking") == 0
    file = FitFile.load(neurons.with_name("qa.fit.safetensors"))
    assert torch.equal(file.layers[1].neurons, NeuronFile.load(neurons).ranking[1][:34])


def test_interrupted_fit_resumes_to_the_same_bytes(model_folder, questions, neurons, monkeypatch, capsys):
    whole, broken = neurons.with_name("whole.safetensors"), neurons.with_name("broken.safetensors")
    assert fit(model_folder, questions, neurons, "--output", str(whole)) == 0
    original, done = Fitter.fit, []

    def fit_or_interrupt(self, layer, *more):
        if done:
            raise KeyboardInterrupt
        done.append(layer)
        return original(self, layer, *more)

    monkeypatch.setattr(Fitter, "fit", fit_or_interrupt)
    assert fit(model_folder, questions, neurons, "--output", str(broken)) == 130
    monkeypatch.undo()
    assert not broken.exists()
    assert fit(model_folder, questions, neurons, "--output", str(broken)) == 1  # neither --resume nor --overwrite
    capsys.readouterr()
    assert fit(model_folder, questions, neurons, "--output", str(broken), "--ridge", "1", "--resume") == 1
    assert "had ridge 0.03, this one has 1.0" in capsys.readouterr().err
    assert fit(model_folder, questions, neurons, "--output", str(broken), "--resume") == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert not broken.with_name("broken.safetensors.checkpoint").exists()
    assert fit(model_folder, questions, neurons, "--output", str(broken)) == 1  # would lose a finished file


def test_result_hardly_depends_on_the_batch_size(model_folder, questions, neurons):
    one, four = neurons.with_name("one.safetensors"), neurons.with_name("four.safetensors")
    assert fit(model_folder, questions, neurons, "--output", str(four)) == 0
    assert fit(model_folder, questions, neurons, "--output", str(one), "--batch_size", "1") == 0
    first, second = FitFile.load(one).layers[1], FitFile.load(four).layers[1]
    assert torch.equal(first.neurons.sort().values, second.neurons.sort().values)
    places = [second.neurons.tolist().index(neuron) for neuron in first.neurons.tolist()]
    assert (first.down - second.down[places]).abs().max() < 1e-3 * second.down.abs().max()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sparsity", "0.8"], "--sparsity must be at most --loaded_neurons_percent, got 0.8 > 0.7"),
        (["--ridge", "-1"], "--ridge must not be negative"),
        (["--end_num", "7"], "end_num must be a layer of the model, 0 to 2, got 7"),
        (["--limit", "3", "--skip", "400"], "there are no texts"),
    ],
)
def test_wrong_usage_is_one_clear_line(model_folder, questions, neurons, capsys, more, message):
    capsys.readouterr()
    assert fit(model_folder, questions, neurons, *more) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "Loading weights" not in line and line.strip()]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_missing_neuron_file_says_how_to_make_one(model_folder, questions, tmp_path, capsys):
    assert fit(model_folder, questions, tmp_path / "none.safetensors") == 1
    assert "python -m profiler run" in capsys.readouterr().err
