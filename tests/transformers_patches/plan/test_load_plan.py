"""Load plans: base neurons first, no neuron twice, counts by the one rule."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.transformers_patches.masked_reference import naive_count, naive_plan
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.load_plan import build_load_plan

LAYERS = 7


def model_config(size: int, layers: int = LAYERS):
    return SimpleNamespace(model_type="llama", intermediate_size=size, num_hidden_layers=layers)


def rankings(seed: int, size: int, layers: int = LAYERS) -> NeuronFile:
    generator = torch.Generator().manual_seed(seed)
    return NeuronFile(torch.stack([torch.randperm(size, generator=generator) for _ in range(layers)]))


@given(
    size=st.integers(1, 60),
    fractions=st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted),
    seed=st.integers(0, 1000),
    base_type=st.sampled_from(["dataset", "model"]),
    method=st.sampled_from(["partinfer", "coreinfer", "dense"]),
)
def test_a_plan_is_the_naive_one(size, fractions, seed, base_type, method):
    delta, phi, gamma = fractions
    settings = PartInferConfig(
        method=method,
        use_partial_loading=True,
        base_neurons_percent=delta,
        sparsity=phi,
        loaded_neurons_percent=gamma,
        base_neurons_type=base_type,
    )
    dataset, model = rankings(seed, size), rankings(seed + 1, size)
    plan = build_load_plan(settings, model_config(size), dataset, model)
    base, other = (dataset, model) if base_type == "dataset" else (model, dataset)

    assert list(plan.layers) == [3, 4]
    for layer, layer_plan in plan.layers.items():
        base_ranking = base.ranking[layer].tolist()
        loaded = layer_plan.neurons.tolist()
        assert loaded == naive_plan(base_ranking, other.ranking[layer].tolist(), delta, gamma)
        assert len(set(loaded)) == len(loaded) == layer_plan.loaded_count == naive_count(gamma, size)
        assert loaded[: naive_count(delta, size)] == base_ranking[: naive_count(delta, size)]
        assert layer_plan.priority.tolist() == [base_ranking.index(n) for n in loaded]
        base_count, computed = {
            "partinfer": (naive_count(delta, size), naive_count(phi, size)),
            "coreinfer": (0, naive_count(phi, size)),
            "dense": (naive_count(gamma, size), naive_count(gamma, size)),
        }[method]
        assert (layer_plan.base_count, layer_plan.computed_count) == (base_count, computed)
    assert plan.loaded_fraction == pytest.approx(naive_count(gamma, size) / size)


def test_dense_without_partial_loading_replaces_nothing():
    plan = build_load_plan(PartInferConfig(method="dense"), model_config(40))
    assert plan.layers == {}
    assert plan.loaded_fraction == 1


def test_coreinfer_without_partial_loading_keeps_the_checkpoints_order():
    ranking = rankings(3, 40)
    plan = build_load_plan(PartInferConfig(method="coreinfer"), model_config(40), ranking)
    for layer, layer_plan in plan.layers.items():
        assert layer_plan.neurons.tolist() == list(range(40))
        assert [ranking.ranking[layer].tolist().index(n) for n in range(40)] == layer_plan.priority.tolist()


def test_coreinfer_without_any_neuron_file_breaks_ties_by_index():
    plan = build_load_plan(PartInferConfig(method="coreinfer"), model_config(40))
    assert plan.layers[3].priority.tolist() == list(range(40))


@pytest.mark.parametrize("given_as", ["dataset", "model"])
@pytest.mark.parametrize("base_type", ["dataset", "model"])
def test_one_neuron_file_ranks_both(given_as, base_type):
    ranking = rankings(5, 40)
    settings = PartInferConfig(base_neurons_type=base_type)
    plan = build_load_plan(settings, model_config(40), **{f"{given_as}_neurons": ranking})
    assert plan.layers[4].neurons.tolist() == ranking.ranking[4, :28].tolist()


@pytest.mark.parametrize("method", ["partinfer", "coreinfer", "dense"])
def test_partial_loading_without_a_neuron_file_is_an_error(method):
    settings = PartInferConfig(method=method, use_partial_loading=True)
    with pytest.raises(PartInferError, match="partial loading needs a neuron file: give --dataset_neurons_filepath"):
        build_load_plan(settings, model_config(40))


def test_layers_outside_the_model_are_an_error():
    with pytest.raises(PartInferError, match="end_num must be a layer of the model, 0 to 6, got 7"):
        build_load_plan(PartInferConfig(end_num=7), model_config(40), rankings(1, 40))


def test_a_saved_plan_says_what_was_loaded(tmp_path):
    plan = build_load_plan(PartInferConfig(), model_config(40), rankings(1, 40), rankings(2, 40))
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["method"] == "partinfer"
    assert (content["num_layers"], content["intermediate_size"]) == (LAYERS, 40)
    assert set(content["layers"]) == {"3", "4"}
    for layer, saved in content["layers"].items():
        assert saved["neurons"] == plan.layers[int(layer)].neurons.tolist()
        assert (saved["base_count"], saved["computed_count"]) == (12, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
