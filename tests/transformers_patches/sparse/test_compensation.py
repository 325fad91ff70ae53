"""Compensation against plain transformers models: the bias of what is left out, refitted rows."""

from __future__ import annotations

import re

import pytest
import torch

from tests.conftest import FAMILIES, HIDDEN, INTERMEDIATE, LAYERS
from tests.transformers_patches.made_up_files import made_up_fit, with_statistics
from tests.transformers_patches.masked_reference import DOWN_PROJECTION, MaskedReference
from tests.transformers_patches.model_passes import SPARSE, assert_equal_where_real, padded_prompts, passes, run
from tests.transformers_patches.token_reference import TokenReference
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model

SETTINGS = {"start_num": 1, "end_num": 4, "dtype": "float32", "device": "cpu"}
NEURONS = with_statistics(1)


def by_spread(layer: int) -> list[int]:
    """All neurons by std(h) ||W_down||, best first."""
    s = {name: values[layer].double() for name, values in NEURONS.statistics.items()}
    spread = (s["mean_sq"] - s["mean"] ** 2).sqrt() * s["down_norm"]
    return sorted(range(INTERMEDIATE), key=lambda neuron: -float(spread[neuron]))


def missing_bias(reference: MaskedReference, layer: int, left_out: list[int], means=None) -> torch.Tensor:
    """[H]: the sum of E[h_i] W_down[:, i] over the neurons that are left out."""
    means = NEURONS.statistics["mean"][layer] if means is None else means
    down = reference.down[layer].weight.float()
    return sum((means[i] * down[:, i] for i in left_out), torch.zeros(HIDDEN))


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_compensation_of_what_is_not_loaded(family, tiny_checkpoints):
    settings = PartInferConfig(selection="up", compensation="mean", **SETTINGS)
    ours = load_model(tiny_checkpoints[family], settings, NEURONS)
    reference = TokenReference(tiny_checkpoints[family])
    for layer in SPARSE:
        order = by_spread(layer)
        reference.loaded[layer], reference.kept[layer] = order[:56], 8 if family == "opt" else 20
        reference.bias[layer] = missing_bias(reference, layer, order[56:])
        assert set(ours.plan.layers[layer].neurons.tolist()) == set(order[:56])
    all_passes = passes(*padded_prompts([7, 3], "left"), [1, 12])
    with torch.no_grad():
        expected = reference.run(all_passes)
    assert_equal_where_real(run(ours.model, all_passes), expected, all_passes[0][1]["attention_mask"])


def test_mean_compensation_of_what_a_prompt_leaves_out(tiny_checkpoints):
    """The means of loaded neurons are blended with the prompt's: 256 tokens' worth of the file's."""
    settings = PartInferConfig(selection="core", compensation="mean", **SETTINGS)
    ours = load_model(tiny_checkpoints["llama"], settings, NEURONS)
    all_passes = passes(*padded_prompts([7], "left"), [1, 1])
    ours_logits = run(ours.model, all_passes)
    reference = TokenReference(tiny_checkpoints["llama"])
    with torch.no_grad():
        for layer in SPARSE:
            order = by_spread(layer)
            reference.mask(layer, order[:56])
            reference.bias[layer] = missing_bias(reference, layer, order[56:])
        output = reference(all_passes[0][0], **all_passes[0][1])
        logits, cache = [output.logits], output.past_key_values
        for number, layer in enumerate(SPARSE):
            plan, module = ours.plan.layers[layer], ours.state.layers[number]
            chosen = [*range(plan.base_count), *module.selection.selected[0].tolist()]
            computed = plan.neurons[chosen].tolist()
            assert len(computed) == 32
            h = reference.seen[layer][0][0]
            means = (h.sum(0) + 256 * NEURONS.statistics["mean"][layer]) / (7 + 256)
            skipped = [n for n in plan.neurons.tolist() if n not in computed]
            reference.bias[layer] = reference.bias[layer] + missing_bias(reference, layer, skipped, means)
            reference.mask(layer, computed)
        for input_ids, kwargs in all_passes[1:]:
            output = reference(input_ids, past_key_values=cache, **kwargs)
            logits.append(output.logits)
    assert_equal_where_real(ours_logits, logits, all_passes[0][1]["attention_mask"])


def save_pair(folder, **options):
    """A neuron file and a fit file beside it, as a user has them."""
    NEURONS.save(folder / "qa.safetensors")
    fit = made_up_fit(**options)
    fit.save(folder / "qa.fit.safetensors")
    return fit, str(folder / "qa.safetensors")


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_a_fit_file_beside_the_neuron_file_is_used(family, tiny_checkpoints, tmp_path):
    fit, path = save_pair(tmp_path)
    ours = load_model(tiny_checkpoints[family], PartInferConfig(dataset_neurons_filepath=path, **SETTINGS))
    assert (ours.settings.selection, ours.settings.compensation) == ("up", "refit")
    reference = TokenReference(tiny_checkpoints[family])
    matrices = 2 if family == "opt" else 3
    for layer, made in fit.layers.items():
        plan = ours.plan.layers[layer]
        assert plan.neurons.tolist() == made.neurons.tolist()
        reference.kept[layer] = round((matrices * 0.4 * INTERMEDIATE - plan.candidate_count) / (matrices - 1))
        assert plan.candidate_count == 56
        reference.loaded[layer] = made.neurons.tolist()
        reference.prior[layer] = torch.zeros(INTERMEDIATE).scatter(0, made.neurons.long(), made.gate_size)
        reference.down[layer].weight.data[:, made.neurons.long()] = made.down.t()
    add_fit(reference, fit)
    all_passes = passes(*padded_prompts([7, 3], "left"), [1, 12])
    ours.reset_counters()
    with torch.no_grad():
        expected = reference.run(all_passes)
    assert_equal_where_real(run(ours.model, all_passes), expected, all_passes[0][1]["attention_mask"])
    assert ours.bytes_fraction() == pytest.approx(0.4, abs=1 / (matrices * INTERMEDIATE))


def add_fit(reference: TokenReference, fit) -> None:
    """Biases, by hooks on the FFNs' own projections."""
    for name, module in reference.model.named_modules():
        if (match := DOWN_PROJECTION.search(name)) and int(match[1]) in fit.layers:

            def add(module, args, output, layer=int(match[1])):
                made = fit.layers[layer]
                return output + (made.bias_decode if reference.decoding else made.bias_prefill)

            module.register_forward_hook(add)


def test_compensation_is_counted_as_weights(tiny_checkpoints, tmp_path):
    _, path = save_pair(tmp_path)
    folder = tiny_checkpoints["llama"]
    ours = load_model(folder, PartInferConfig(dataset_neurons_filepath=path, **SETTINGS))
    plain = load_model(folder, PartInferConfig(selection="core", compensation="none", **SETTINGS), NEURONS)
    added = 4 * 2 * HIDDEN * 4  # two biases in 4 layers, float32
    assert ours.report.bytes_resident == plain.report.bytes_resident + added


def test_refitted_rows_are_read_instead_of_the_checkpoints(tiny_checkpoints, tmp_path):
    fit, path = save_pair(tmp_path)
    read = {
        compensation: load_model(
            tiny_checkpoints["llama"],
            PartInferConfig(dataset_neurons_filepath=path, compensation=compensation, **SETTINGS),
        ).report.bytes_read
        for compensation in ("refit", "none")
    }
    down = 4 * INTERMEDIATE * HIDDEN * 4  # 4 layers, float32: columns are read as whole tensors
    assert read["refit"] == read["none"] - down + sum(layer.nbytes for layer in fit.layers.values())


def test_thresholds_of_a_fit_are_used_for_what_they_were_made_for(tiny_checkpoints, tmp_path):
    fit, path = save_pair(tmp_path)
    ask = {"dataset_neurons_filepath": path, **SETTINGS}

    def settled(**settings) -> tuple[str, list[float | None]]:
        ours = load_model(tiny_checkpoints["llama"], PartInferConfig(**(ask | settings)))
        return ours.settings.token_count, [layer.selection.prior.threshold for layer in ours.state.layers]

    assert settled() == ("exact", [None] * 4)  # a fit of before there were thresholds
    for number, layer in fit.layers.items():
        layer.threshold = torch.tensor([number / 8])
    fit.metadata["selection"] = "up"
    fit.save(tmp_path / "qa.fit.safetensors")
    assert settled() == ("average", [0.125, 0.25, 0.375, 0.5])
    assert settled(token_count="exact")[0] == "exact"
    assert settled(sparsity=0.5) == ("exact", [None] * 4)
    assert settled(selection="gate") == ("exact", [None] * 4)
    assert settled(compensation="mean") == ("exact", [None] * 4)
    assert settled(selection="core")[0] == "exact"


def test_every_layer_can_have_its_own_budget(tiny_checkpoints, tmp_path):
    fit, path = save_pair(tmp_path, layers=range(LAYERS), layer_sparsity='{"0": 0.6, "1": 0.5, "2": 0.4, '
                          '"3": 0.4, "4": 0.3, "5": 0.3}')  # fmt: skip
    settings = {"dataset_neurons_filepath": path, "dtype": "float32", "device": "cpu"}
    ours = load_model(tiny_checkpoints["llama"], PartInferConfig(budget="per_layer", **settings))
    assert list(ours.plan.layers) == list(range(LAYERS))
    kept = [plan.computed_count for plan in ours.plan.layers.values()]
    candidates = [plan.candidate_count for plan in ours.plan.layers.values()]
    assert candidates == [56, 56, 56, 56, 42, 42]
    assert kept == [44, 32, 20, 20, 15, 15]
    ours.reset_counters()
    run(ours.model, passes(*padded_prompts([5], "left"), [1, 1]))
    assert ours.bytes_fraction() == pytest.approx(2.5 / 6)
    even = load_model(tiny_checkpoints["llama"], PartInferConfig(start_num=1, end_num=4, **settings))
    assert even.settings.compensation == "mean"  # the fit is for another budget
    found = load_model(tiny_checkpoints["llama"], PartInferConfig(**settings)).settings
    assert (found.budget, found.compensation) == ("per_layer", "refit")
    for compensation in ("none", "mean"):  # what does not use the fit leaves its shares alone, too
        plain = load_model(tiny_checkpoints["llama"], PartInferConfig(compensation=compensation, **settings))
        assert plain.settings.budget == "uniform"
    other = load_model(tiny_checkpoints["llama"], PartInferConfig(sparsity=0.5, **settings)).settings
    assert (other.budget, other.compensation) == ("uniform", "mean")
    original = PartInferConfig(selection="core", compensation="none", budget="uniform", **settings)
    assert load_model(tiny_checkpoints["llama"], original).plan.layers[3].computed_count == 32
    with pytest.raises(PartInferError, match="has shares of every layer for sparsity 0.4, not 0.5"):
        load_model(
            tiny_checkpoints["llama"],
            PartInferConfig(sparsity=0.5, budget="per_layer", compensation="refit", **settings),
        )


AUTO = [
    ({}, None, ("core", "none")),
    ({}, NEURONS, ("up", "mean")),
    ({"method": "coreinfer"}, NEURONS, ("core", "none")),
    ({"method": "dense", "use_partial_loading": True}, NEURONS, ("core", "none")),
    ({"selection": "glass"}, NEURONS, ("glass", "mean")),
    ({"compensation": "none"}, NEURONS, ("up", "none")),
    ({"selection": "core", "compensation": "none"}, NEURONS, ("core", "none")),
]


@pytest.mark.parametrize("options, neurons, expected", AUTO)
def test_auto_follows_what_the_files_have(options, neurons, expected, tiny_checkpoints):
    from tests.conftest import random_neuron_file

    ours = load_model(
        tiny_checkpoints["llama"], PartInferConfig(**options, **SETTINGS), neurons or random_neuron_file(1)
    )
    assert (ours.settings.selection, ours.settings.compensation) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compensation": "mean"}, "needs the statistics mean, mean_sq and down_norm, which \\(in memory\\) lacks"),
        ({"compensation": "refit"}, "compensation refit needs a fit file made for it, but there is none"),
        ({"budget": "per_layer"}, "budget per_layer needs a fit file with a share for every layer"),
        ({"fit_filepath": "nowhere.fit.safetensors"}, "no fit file at nowhere.fit.safetensors"),
    ],
)
def test_what_the_files_cannot_give_is_an_error(options, message, tiny_checkpoints):
    from tests.conftest import random_neuron_file

    with pytest.raises(PartInferError, match=message):
        load_model(tiny_checkpoints["llama"], PartInferConfig(**options, **SETTINGS), random_neuron_file(1))


def test_a_fit_for_something_else_says_what_for(tiny_checkpoints, tmp_path):
    _, path = save_pair(tmp_path)
    folder, options = tiny_checkpoints["llama"], {"dataset_neurons_filepath": path, **SETTINGS}
    with pytest.raises(PartInferError, match="made for loaded_neurons_percent 0.7, not 0.6"):
        load_model(folder, PartInferConfig(compensation="refit", loaded_neurons_percent=0.6, **options))
    with pytest.raises(PartInferError, match="made for other layers"):
        load_model(folder, PartInferConfig(compensation="refit", **{**options, "end_num": 3}))
    assert load_model(folder, PartInferConfig(**{**options, "end_num": 3})).settings.compensation == "mean"


@pytest.mark.parametrize("compensation", ["lowrank", "lowrank+refit"])
def test_a_fit_with_low_rank_maps_is_refused(compensation, tiny_checkpoints, tmp_path):
    """Files of before low-rank maps were removed; without the fit the model loads."""
    _, path = save_pair(tmp_path, compensation=compensation)
    folder, options = tiny_checkpoints["llama"], {"dataset_neurons_filepath": path, **SETTINGS}
    with pytest.raises(
        PartInferError, match=f"made for compensation '{re.escape(compensation)}', of which low-rank maps"
    ):
        load_model(folder, PartInferConfig(**options))
    assert load_model(folder, PartInferConfig(compensation="mean", **options)).settings.compensation == "mean"


def test_refitted_rows_are_quantised_like_others(tiny_checkpoints, tmp_path):
    _, path = save_pair(tmp_path)
    options = {**SETTINGS, "dtype": "int8", "dataset_neurons_filepath": path}
    ours = load_model(tiny_checkpoints["llama"], PartInferConfig(**options))
    plain = load_model(tiny_checkpoints["llama"], PartInferConfig(**{**options, "dtype": "bfloat16"}))
    all_passes = passes(*padded_prompts([7], "left"), [1])
    for a, b in zip(run(ours.model, all_passes)[:1], run(plain.model, all_passes), strict=False):
        assert (a - b).float().norm() < 0.1 * b.float().norm()
