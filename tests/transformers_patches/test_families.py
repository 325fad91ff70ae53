"""Families find the parts of transformers' models; an unknown architecture lists the known ones and where to add it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import FAMILY_CONFIGS, HIDDEN, INTERMEDIATE, LAYERS
from transformers_patches.errors import PartInferError
from transformers_patches.families import FAMILIES, family_of


def test_every_known_architecture_is_tested():
    assert {model_type for model_type, _ in FAMILY_CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_family_finds_weights_sizes_and_names(name):
    model_type, options = FAMILY_CONFIGS[name]
    config = AutoConfig.for_model(model_type, **options)
    family = family_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert family.intermediate_size(config) == INTERMEDIATE
    assert len(family.decoder_layers(model)) == LAYERS
    parameters = dict(model.named_parameters())
    norms = (family.attention_norm, family.ffn_norm, family.attention_post_norm, family.ffn_post_norm)
    for norm in {norm for norm in (*norms, family.identifying_norm) if norm}:
        assert parameters[f"{family.layers}.0.{norm}.weight"].shape == (HIDDEN,)
    assert f"{family.decoder}.{family.last_norm}.weight" in parameters
    children = dict(family.decoder_layers(model)[0].named_modules())
    assert all(place in children for places in family.inputs().values() for place in places)
    for layer in range(LAYERS):
        for projection in family.ffn_inputs:
            assert parameters[family.projection(layer, projection) + ".weight"].shape == (INTERMEDIATE, HIDDEN)
        assert family.down_projection(model, layer).weight.shape == (HIDDEN, INTERMEDIATE)
        assert (
            parameters[family.projection(layer, family.down) + ".weight"] is family.down_projection(model, layer).weight
        )


@pytest.mark.parametrize("model_type", ["gpt2", "mamba"])
def test_an_unknown_architecture_lists_the_known_ones(model_type):
    with pytest.raises(PartInferError) as raised:
        family_of(AutoConfig.for_model(model_type))
    assert f"unknown architecture '{model_type}'" in str(raised.value)
    assert all(known in str(raised.value) for known in FAMILIES)
    assert "add a Family to FAMILIES in transformers_patches/families.py" in str(raised.value)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_an_ffn_is_swapped_and_put_back(tiny_checkpoints, name):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints[name]).eval()
    family, ids = family_of(model.config), torch.tensor([[5, 9, 33]])
    layer = family.decoder_layers(model)[2]
    before = model(ids).logits
    originals = family.swap_ffn(layer, Twice())
    assert (model(ids).logits - before).abs().max() > 1e-3
    for place, module in originals.items():
        layer.set_submodule(place, module)
    assert torch.equal(model(ids).logits, before)


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_windows_are_the_configs_or_the_attentions_own(tiny_checkpoints):
    attention, config = nn.Module(), SimpleNamespace(sliding_window=7)
    assert FAMILIES["mistral"].sliding_window(attention, config) == 7
    assert FAMILIES["llama"].sliding_window(attention, config) == 0
    attention.sliding_window = 5
    assert FAMILIES["qwen2"].sliding_window(attention, config) == 5
    assert FAMILIES["mistral"].sliding_window(attention, SimpleNamespace(sliding_window=None)) == 0
