"""PartInferConfig: defaults, contradictions and their messages, argparse flags, the sparse layers."""

import argparse
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_patches.config import PartInferConfig, neuron_count
from transformers_patches.errors import PartInferError

FRACTIONS = st.floats(0, 1)
SIZES = st.integers(1, 20_000)


@given(FRACTIONS, SIZES)
def test_neuron_count_rounds_half_to_even_and_is_at_least_one(fraction, size):
    exact = int(Decimal(fraction * size).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))
    assert neuron_count(fraction, size) == max(1, exact)


@given(FRACTIONS, FRACTIONS, SIZES)
def test_neuron_count_stays_within_the_layer_and_keeps_the_order_of_fractions(first, second, size):
    low, high = sorted((first, second))
    assert 1 <= neuron_count(low, size) <= neuron_count(high, size) <= size


@pytest.mark.parametrize(
    "fraction, size, expected",
    [(0.5, 1, 1), (0.5, 3, 2), (0.5, 5, 2), (0.5, 7, 4), (0.0, 80, 1), (1.0, 80, 80), (0.4, 8192, 3277)],
)
def test_neuron_count_of_known_cases(fraction, size, expected):
    assert neuron_count(fraction, size) == expected


def test_defaults_are_those_of_the_paper():
    config = PartInferConfig()
    assert (config.method, config.use_partial_loading) == ("partinfer", True)
    assert (config.loaded_neurons_percent, config.sparsity, config.base_neurons_percent) == (0.7, 0.4, 0.3)
    assert (config.token_sparsity, config.base_neurons_type) == (0.2, "dataset")


def test_fractions_not_given_follow_sparsity():
    assert PartInferConfig(sparsity=0.9).loaded_neurons_percent == 0.9
    assert PartInferConfig(sparsity=0.1).base_neurons_percent == 0.1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "powerinfer"}, "method must be one of partinfer, coreinfer, dense, got 'powerinfer'"),
        ({"base_neurons_type": "random"}, "base_neurons_type must be one of dataset, model, got 'random'"),
        ({"dtype": "int2"}, "dtype must be one of auto, float32, bfloat16, float16, int8, int4, got 'int2'"),
        ({"sparsity": 1.5}, r"sparsity must be a fraction in \[0, 1\], got 1.5"),
        ({"sparsity": float("nan")}, r"sparsity must be a fraction in \[0, 1\], got nan"),
        ({"loaded_neurons_percent": -0.1}, r"loaded_neurons_percent must be a fraction in \[0, 1\], got -0.1"),
        ({"base_neurons_percent": 30}, r"base_neurons_percent must be a fraction in \[0, 1\], got 30"),
        ({"token_sparsity": 2}, r"token_sparsity must be a fraction in \[0, 1\], got 2"),
        ({"base_neurons_percent": 0.5}, "base_neurons_percent must be at most sparsity, got 0.5 > 0.4"),
        ({"loaded_neurons_percent": 0.35}, "sparsity must be at most loaded_neurons_percent, got 0.4 > 0.35"),
        (
            {"method": "coreinfer", "use_partial_loading": True, "loaded_neurons_percent": 0.35},
            "sparsity must be at most loaded_neurons_percent, got 0.4 > 0.35",
        ),
        (
            {"method": "dense", "use_partial_loading": True, "loaded_neurons_percent": 0.2},
            "base_neurons_percent must be at most loaded_neurons_percent, got 0.3 > 0.2",
        ),
        (
            {"selection": "best"},
            "selection must be one of auto, core, griffin, blend, glass, similarity, up, gate, got 'best'",
        ),
        ({"compensation": "mean+rank"}, r"compensation must be one of auto, none, mean, refit, got 'mean\+rank'"),
        ({"compensation": "lowrank"}, "compensation must be one of auto, none, mean, refit, got 'lowrank'"),
        ({"budget": "even"}, "budget must be one of auto, uniform, per_layer, got 'even'"),
        ({"token_count": "average", "selection": "core"}, "token_count average belongs to selection up or gate, got"),
        ({"token_count": "some"}, "token_count must be one of auto, exact, average, got 'some'"),
        ({"memory_limit": True, "selection": "up"}, "selection up chooses for every token: use one of core, griffin"),
        ({"memory_limit": True, "device": "cpu"}, "memory_limit .* got device cpu"),
        ({"memory_limit": True, "method": "dense"}, "memory_limit needs a sparse method .* got method dense"),
    ],
)
def test_contradictions_say_what_was_given_and_expected(options, message):
    with pytest.raises(PartInferError, match=message):
        PartInferConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "coreinfer", "loaded_neurons_percent": 0.2},  # nothing is loaded partially
        {"method": "dense", "use_partial_loading": True, "sparsity": 1.0, "loaded_neurons_percent": 0.5},
        {"sparsity": 0.0, "base_neurons_percent": 0.0, "loaded_neurons_percent": 0.0},
        {"sparsity": 1.0, "base_neurons_percent": 1.0, "loaded_neurons_percent": 1.0, "token_sparsity": 1.0},
    ],
)
def test_settings_that_do_not_contradict_each_other_are_accepted(options):
    PartInferConfig(**options)


@pytest.mark.parametrize(
    "num_layers, options, expected",
    [
        (28, {}, (3, 25)),  # Llama-3.2-3B, as in the paper
        (30, {}, (3, 27)),
        (6, {}, (3, 3)),
        (28, {"start_num": 0}, (0, 25)),
        (28, {"end_num": 27}, (3, 27)),
        (28, {"start_num": 27, "end_num": 27}, (27, 27)),
        (1, {"start_num": 0, "end_num": 0}, (0, 0)),
    ],
)
def test_sparse_layers_include_both_ends(num_layers, options, expected):
    layers = PartInferConfig(**options).resolve_layers(num_layers)
    assert (layers[0], layers[-1]) == expected


@pytest.mark.parametrize(
    "num_layers, options, message",
    [
        (28, {"end_num": 28}, "end_num must be a layer of the model, 0 to 27, got 28"),
        (28, {"start_num": -1}, "start_num must be a layer of the model, 0 to 27, got -1"),
        (28, {"start_num": 9, "end_num": 8}, "start_num 9 is after end_num 8 in a model of 28 layers"),
        (5, {}, "start_num 3 is after end_num 2 in a model of 5 layers"),
    ],
)
def test_sparse_layers_outside_the_model_are_an_error(num_layers, options, message):
    with pytest.raises(PartInferError, match=message):
        PartInferConfig(**options).resolve_layers(num_layers)


def parse(*flags: str, skip: tuple[str, ...] = ()) -> PartInferConfig:
    parser = argparse.ArgumentParser()
    PartInferConfig.add_arguments(parser, skip=skip)
    return PartInferConfig.from_arguments(parser.parse_args(flags))


def test_no_flags_give_the_defaults():
    assert parse() == PartInferConfig()


@pytest.mark.parametrize(
    "config",
    [
        PartInferConfig(sparsity=0.5, base_neurons_percent=0.25, loaded_neurons_percent=0.75, token_sparsity=0.1),
        PartInferConfig(method="coreinfer", start_num=1, end_num=9, dtype="bfloat16", memory_limit=True, device="cuda"),
        PartInferConfig(
            method="dense",
            use_partial_loading=True,
            base_neurons_type="model",
            dataset_neurons_filepath="a.json",
            model_neurons_filepath="b.safetensors",
        ),
    ],
)
def test_every_field_survives_the_command_line(config):
    flags = []
    for name, value in config.to_dict().items():
        if value is True:
            flags.append(f"--{name}")
        elif value not in (None, False):
            flags += [f"--{name}", str(value)]
    assert parse(*flags) == config


def test_help_names_every_field_and_its_default(capsys):
    parser = argparse.ArgumentParser()
    PartInferConfig.add_arguments(parser, skip=("device",))
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in PartInferConfig().to_dict():
        assert (f"--{name}" in text) == (name != "device")
    assert "phi (0.4)" in text
    assert "alpha (0.2)" in text


def test_an_unknown_choice_is_a_usage_error():
    with pytest.raises(SystemExit) as raised:
        parse("--method", "sparse")
    assert raised.value.code == 2
