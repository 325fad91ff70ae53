"""The loss curve: measured as decoding computes, and added to neuron files."""

from __future__ import annotations

import json

import pytest
import torch

from profiler.__main__ import main
from profiler.loss_measurement import LossMeasurement, ScoredText, scored_texts
from tests.conftest import LAYERS, make_tiny_checkpoint
from tests.transformers_patches.made_up_files import with_statistics
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.loss_curve import ALL, DEFAULT
from transformers_patches.neurons.neuron_file import NeuronFile

TEXTS = [ScoredText(list(range(3, 40)), list(range(50, 62))), ScoredText(list(range(90, 60, -1)), list(range(20, 28)))]


@pytest.fixture(scope="module", params=["llama", "opt"])
def measured(request, tmp_path_factory):
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("model") / request.param, request.param)
    neurons = with_statistics(1)
    settings = {"dtype": "float32", "device": "cpu"}
    return folder, neurons, LossMeasurement(folder, settings, neurons, TEXTS).curve(quiet=True)


def excess(folder, neurons, **settings) -> float:
    """Mean excess NLL of the texts' targets, scored plainly with the settings."""
    sums = {}
    for name, options in {"dense": {"method": "dense"}, "sparse": settings}.items():
        model = load_model(folder, PartInferConfig(dtype="float32", device="cpu", **options), neurons).model
        total = tokens = 0.0
        for text in TEXTS:
            with torch.inference_mode():
                cache = model(torch.tensor([text.prompt[:-1]]), use_cache=True).past_key_values
                fed = torch.tensor([text.prompt[-1:] + text.target[:-1]])
                mask = torch.ones(1, len(text.prompt) + len(text.target) - 1, dtype=torch.int64)
                logits = model(fed, past_key_values=cache, attention_mask=mask).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(text.target), reduction="sum"))
            tokens += len(text.target)
        sums[name] = total / tokens
    return sums["sparse"] - sums["dense"]


def test_points_are_those_of_models_loaded_with_the_settings(measured):
    folder, neurons, curve = measured
    points = {(p.selection, p.layers, p.loaded, p.sparsity): p for p in curve.points}
    partial = points["up", DEFAULT, 0.7, 0.55]
    options = {"loaded_neurons_percent": 0.7, "sparsity": 0.55, "selection": "up", "compensation": "mean"}
    assert partial.nll == pytest.approx(excess(folder, neurons, **options, token_count="exact"), abs=1e-4)
    original = points["core", DEFAULT, 0.7, 0.4]
    assert original.nll == pytest.approx(excess(folder, neurons, selection="core", compensation="none"), abs=1e-4)
    with_curve = NeuronFile(neurons.ranking, statistics=neurons.statistics, loss=curve)
    whole = {"max_loss": points["up", ALL, 1.0, 0.6].loss + 1e-6}
    if curve.sparsity_for(whole["max_loss"]) == 0.6:
        assert points["up", ALL, 1.0, 0.6].nll == pytest.approx(excess(folder, with_curve, **whole), abs=1e-4)


def test_fewer_bytes_diverge_more_and_everything_not_at_all(measured):
    whole = measured[2].whole
    assert [p.sparsity for p in whole] == sorted((p.sparsity for p in whole), reverse=True)
    assert -1e-6 < whole[0].kl < whole[-1].kl  # sums of rounded terms
    assert measured[2].predict("up", ALL, 1.0, 1.0) == 0.0


def test_thresholds_fall_with_the_share(measured):
    thresholds = measured[2].thresholds
    assert thresholds.shape[1] == LAYERS
    assert bool((thresholds[1:] >= thresholds[:-1]).all())


def test_texts_are_cut_where_the_prompt_ends():
    continued, whole, short = (list(range(100)), 90), (list(range(30)), 30), ([1], 1)
    texts = scored_texts([continued, whole, short])
    assert [(len(t.prompt), len(t.target)) for t in texts] == [(90, 10), (20, 10)]
    assert texts[0].target == list(range(90, 100))
    assert len(scored_texts([continued, whole], wanted=5)) == 1


def test_run_measures_and_the_command_measures_again(model_folder, questions, tmp_path, capsys):
    output = tmp_path / "own.safetensors"
    common = ["--checkpoint_path", str(model_folder), "--dataset", str(questions), "--task_type", "QA", "--limit", "6"]
    assert main(["run", *common, "--max_new_tokens", "4", "--output", str(output), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "FFN bytes read at --max_loss" in shown
    first = NeuronFile.load(output).loss
    assert {p.layers for p in first.points} == {ALL}  # 3 layers are too few for the default ones
    assert main(["loss", str(output), *common, "--max_new_tokens", "8", "--ladder", "--json=-", "--quiet"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["losses"]) == len(first.points)
    rungs = NeuronFile.load(output).ladder.rungs
    assert [rung["block_bytes"] for rung in content["ladder"]] == [rung.block_bytes for rung in rungs]
    assert rungs[-1].block_bytes <= 0.4
    assert NeuronFile.load(output).loss.points != first.points
    assert torch.equal(NeuronFile.load(output).ranking, NeuronFile.load(output).ranking)


def test_a_ranking_without_losses_where_none_are_wanted(model_folder, questions, tmp_path):
    output = tmp_path / "own.safetensors"
    common = ["--checkpoint_path", str(model_folder), "--dataset", str(questions), "--task_type", "QA", "--limit", "3"]
    assert main(["run", *common, "--max_new_tokens", "0", "--loss_tokens", "0", "--output", str(output)]) == 0
    assert NeuronFile.load(output).loss is None
    assert NeuronFile.load(output).ladder is None
