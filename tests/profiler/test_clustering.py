"""Clusters of texts: groups, centers and counts against plain computations, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from profiler.__main__ import main
from profiler.clustering import k_means, make_clusters
from tests.profiler.conftest import tiny_llama
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.clusters import Clusters
from transformers_patches.neurons.neuron_file import NeuronFile

LAYERS, SIZE = 3, 48


def a_file() -> NeuronFile:
    torch.manual_seed(3)
    return NeuronFile(torch.stack([torch.randperm(SIZE) for _ in range(LAYERS)]).int())


def down_inputs(model, ids: list[int]) -> dict[int, torch.Tensor]:
    """h [T, N] of every layer."""
    seen = {}
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x, n=number: seen.update({n: x[0][0].detach()}))
        for number, layer in enumerate(model.model.layers)
    ]
    model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


def test_groups_that_lie_apart_are_found():
    torch.manual_seed(0)
    right = torch.arange(40) % 4
    points = F.normalize(torch.eye(8)[right] + 0.1 * torch.randn(40, 8), dim=1)
    for seed in range(5):
        groups = k_means(points, 4, seed)
        assert len({(a, b) for a, b in zip(right.tolist(), groups.tolist(), strict=True)}) == 4
    assert len(k_means(points[:1].expand(5, 8), 3, 0)) == 5, "equal points are no reason to fail"


def test_centers_and_counts_are_those_of_the_texts():
    """One cluster, so that it has all texts; h from the model's own layers."""
    model, neurons = tiny_llama(), a_file()
    texts = [[5, 9, 70], [200, 3, 3, 8, 120], [44]]
    found, sizes = make_clusters(model, neurons, texts, 1, seed=0, quiet=True)
    assert sizes == [3]
    places = neurons.ranking.long().argsort(dim=1)
    centers, counts = torch.zeros(LAYERS, SIZE), torch.zeros(LAYERS, SIZE)
    for ids in texts:
        seen = down_inputs(model, ids)
        for layer, h in seen.items():
            centers[layer] += F.normalize(h, dim=1).mean(0) / 3
            positive = (h > 0).sum(1).double().mean()
            kept = int(0.2 * positive)
            marked = torch.zeros(SIZE)
            for token in h:
                marked[token.topk(kept).indices] += 1
            best = sorted(range(SIZE), key=lambda i: (-marked[i], places[layer, i]))
            counts[layer, best[: round(0.4 * SIZE)]] += 1
    torch.testing.assert_close(found.centers[0].float(), centers, atol=1e-3, rtol=1e-3)
    assert torch.equal(found.counts[0], counts.int())


def test_fewer_texts_than_clusters():
    with pytest.raises(PartInferError, match="3 clusters need at least as many texts, there are 2"):
        make_clusters(tiny_llama(), a_file(), [[1], [2]], 3, seed=0, quiet=True)


def test_the_command_adds_clusters_that_a_run_uses(model_folder, questions, tmp_path, capsys):
    path = tmp_path / "neurons.safetensors"
    a_file().save(path)
    flags = f"--checkpoint_path {model_folder} --dataset {questions} --task_type QA --clusters 3 --json --quiet"
    assert main(["cluster", str(path), *flags.split()]) == 0
    said = json.loads(capsys.readouterr().out)
    assert sum(said["clusters"]) == said["texts"] == 21
    file = NeuronFile.load(path)
    assert file.clusters.counts.shape == (len(said["clusters"]), LAYERS, SIZE)
    assert file.clusters.counts.sum(2).unique().numel() <= 3, "each text has as many core neurons"
    settings = PartInferConfig(selection="similarity", start_num=0, end_num=2, device="cpu")
    loaded = load_model(model_folder, settings, file)
    loaded.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert loaded.computed_fraction() == pytest.approx(19 / 48)


@pytest.mark.parametrize(
    "clusters",
    [
        Clusters(torch.zeros(2, LAYERS, SIZE + 1).half(), torch.zeros(2, LAYERS, SIZE + 1).int()),
        Clusters(torch.zeros(2, LAYERS, SIZE).half(), torch.zeros(1, LAYERS, SIZE).int()),
        Clusters(torch.zeros(0, LAYERS, SIZE).half(), torch.zeros(0, LAYERS, SIZE).int()),
        Clusters(torch.full((1, LAYERS, SIZE), torch.nan).half(), torch.zeros(1, LAYERS, SIZE).int()),
        Clusters(torch.zeros(1, LAYERS, SIZE).half(), torch.full((1, LAYERS, SIZE), -1)),
        Clusters(torch.zeros(1, LAYERS, SIZE).half(), torch.zeros(1, LAYERS, SIZE)),
    ],
)
def test_clusters_that_fit_no_ranking_are_refused(clusters):
    with pytest.raises(PartInferError, match="make (them|the file) again"):
        NeuronFile(a_file().ranking, clusters=clusters)
