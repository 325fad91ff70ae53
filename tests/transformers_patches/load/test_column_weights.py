"""Weights of columns: by name, and in the scales of every quantised weight of a loaded model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import HIDDEN, random_neuron_file
from tests.transformers_patches.made_up_files import with_input_squares
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import FAMILIES, family_of
from transformers_patches.load.column_weights import column_weights
from transformers_patches.load.loader import load_model
from transformers_patches.modules.quantized import weight_places

NEURONS = with_input_squares(5)


def load(folder, dtype: str, neurons=NEURONS, **options):
    settings = PartInferConfig(start_num=1, end_num=4, dtype=dtype, device="cpu", kernels="torch", **options)
    return load_model(folder, settings, neurons)


def test_files_without_statistics_of_inputs_weight_nothing():
    for neurons in (None, random_neuron_file(1)):
        assert column_weights(FAMILIES["llama"], neurons, "lm_head.weight") == {}


def test_inputs_that_were_always_zero_weight_all_columns_alike():
    neurons = with_input_squares(5)
    neurons.input_squares["ffn"][2] = 0
    weights = column_weights(FAMILIES["llama"], neurons, "lm_head.weight")
    assert torch.equal(weights["model.layers.2.mlp.up_proj.weight"], torch.ones(HIDDEN))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_every_weight_whose_columns_are_inputs_is_quantized_with_them(checkpoint, dtype):
    """Scales equal those of the checkpoint's weights quantised with the statistics, of neuron-major down rows without."""
    ours = load(checkpoint, dtype, head_dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    family = family_of(plain.config)
    head = "lm_head.weight"
    if plain.config.tie_word_embeddings:
        head = plain.all_tied_weights_keys[head]
    known, parameters = column_weights(family, NEURONS, head), dict(plain.named_parameters())
    assert all(name in known for name in parameters if "_proj.weight" in name or name == head)
    checked = set()
    for name, place in weight_places(ours.model):
        if name in parameters and hasattr(place, "packed"):
            expected = kernels.quantize(parameters[name], kernels.format_named(dtype), known.get(name))
            assert torch.equal(place.packed.scales, expected.scales), name
            checked.add(name)
    for layer, plan in ours.plan.layers.items():
        ffn = next(
            m for n, m in ours.model.named_modules() if n.startswith(f"{family.layers}.{layer}.") and hasattr(m, "up")
        )
        for held, projection in (("gate", family.gate), ("up", family.up), ("down", family.down)):
            if projection is None:
                continue
            name = f"{family.projection(layer, projection)}.weight"
            weight = parameters[name].t() if held == "down" else parameters[name]
            rows, packed = weight[plan.neurons].contiguous(), getattr(ffn, held).packed
            counts = None if held == "down" else known[name]
            expected = kernels.quantize(rows, kernels.format_named(dtype), counts, packed.column_scales)
            assert torch.equal(packed.scales, expected.scales), name
            if held == "down":  # of all neurons, not only of those that are loaded
                assert torch.equal(packed.column_scales, weight.abs().amax(dim=0) / 64)
    assert head in checked
    assert len(checked) >= 4 * plain.config.num_hidden_layers


def test_statistics_of_another_width_are_refused(tiny_checkpoints):
    neurons = with_input_squares(5)
    neurons.input_squares["ffn"] = torch.ones(neurons.num_layers, HIDDEN + 32)
    with pytest.raises(
        PartInferError,
        match="input_squares.ffn of 64 columns, but llama has 32: use a neuron file made from this model",
    ):
        load(tiny_checkpoints["llama"], "int4", neurons)
