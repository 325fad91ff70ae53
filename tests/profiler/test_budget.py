"""Where a budget goes: the allocation on made-up losses, the estimate on tiny models."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from profiler.__main__ import main
from profiler.budget import STEP, Loss, MissingEnergy, Share, allocate, spread_budget
from profiler.layerwise import LayerwiseModel, make_batches
from profiler.simulation import Counts
from tests.conftest import LAYERS, VOCABULARY
from transformers_patches.neurons.fit_file import FitFile


def energy(seed: int = 0, matrices: int = 3) -> MissingEnergy:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(30, 40, generator=generator) * torch.linspace(2, 0.1, 40)
    left = h.square().mean(0).flip(0).cumsum(0).flip(0)
    return MissingEnergy(
        h.abs().mean(0), torch.arange(40), torch.cat([left, left.new_zeros(1)]), h.square(), h.abs(), matrices
    )


def test_missing_energy_is_what_a_loop_over_tokens_says():
    ours, share = energy(), Share(0.5, 0.4)
    loaded, kept = 20, 14  # (3 · 0.4 · 40 - 20) / 2
    assert ours.counts(share) == Counts(loaded, loaded, kept, 0)
    expected = sum(float(ours.squares[:, i].mean()) for i in range(loaded, 40))
    for token in ours.squares.tolist():
        expected += sum(sorted(token[:loaded])[: loaded - kept]) / len(ours.squares)
    assert ours.at(share) == pytest.approx(expected, rel=1e-5)
    assert ours.at(Share(1.0, 1.0)) == 0


@pytest.mark.parametrize(("loaded", "read"), [(4 * 0.7, 4 * 0.4), (4 * 0.8, 4 * 0.8), (4.0, 4 * 0.5), (4.0, 4.0)])
def test_budgets_are_met_and_used(loaded, read):
    shares = allocate({layer: Loss(energy(layer), 1.0) for layer in range(4)}, loaded, read)
    every = [shares.get(layer, Share(1.0, 1.0)) for layer in range(4)]
    assert sum(share.loaded for share in every) <= loaded + STEP / 2
    assert sum(share.sparsity for share in every) <= read + STEP / 2
    assert sum(share.sparsity for share in every) >= read - STEP * 4
    assert all(share.sparsity <= share.loaded <= 1 for share in every)


def test_a_layer_that_matters_more_gets_more():
    shares = allocate({0: Loss(energy(), 50.0), 1: Loss(energy(), 1.0)}, 1.4, 0.9)
    first, second = (shares.get(layer, Share(1.0, 1.0)) for layer in (0, 1))
    assert first.loaded > second.loaded
    assert first.sparsity > second.sparsity


def test_the_estimate_is_made_for_every_family(checkpoint):
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(3, VOCABULARY, (6, 30), generator=generator).tolist()
    model = LayerwiseModel(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    before = [p.clone() for p in model.model.parameters()]
    shares = spread_budget(model, make_batches(sequences, [20] * 6, 3), 0.7 * LAYERS, 0.5 * LAYERS, Share(0.7, 0.5))
    every = [shares.get(layer, Share(1.0, 1.0)) for layer in range(LAYERS)]
    assert sum(share.loaded for share in every) == pytest.approx(0.7 * LAYERS, abs=0.1)
    assert len({share.loaded for share in every} | {share.sparsity for share in every}) > 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.model.parameters(), strict=True))


def test_fit_file_holds_the_share_of_every_layer(model_folder, questions, tmp_path):
    neurons = tmp_path / "qa.safetensors"
    texts = ["--checkpoint_path", str(model_folder), "--dataset", str(questions), "--device", "cpu", "--quiet"]
    texts += ["--task_type", "QA", "--max_new_tokens", "5"]
    assert main(["run", *texts, "--output", str(neurons)]) == 0
    more = ["--start_num", "1", "--end_num", "2", "--budget", "per_layer"]
    assert main(["fit", *texts, "--neurons", str(neurons), *more]) == 0
    file = FitFile.load(tmp_path / "qa.fit.safetensors")
    shares = json.loads(file.metadata["layer_sparsity"])
    assert sorted(map(int, shares)) == sorted(file.layers)
    loaded = sum(len(layer.neurons) / 48 for layer in file.layers.values()) + 3 - len(file.layers)
    assert loaded == pytest.approx(1 + 2 * 0.7, abs=0.1)
