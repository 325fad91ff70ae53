"""FFN families: the specs find the FFNs of transformers' models; an unknown architecture lists the known ones."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import FAMILY_CONFIGS, HIDDEN, INTERMEDIATE, LAYERS
from transformers_patches.errors import PartInferError
from transformers_patches.families import FAMILIES, ffn_spec


def test_every_known_architecture_is_tested():
    assert {model_type for model_type, _ in FAMILY_CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_the_spec_finds_weights_sizes_and_names(family):
    model_type, options = FAMILY_CONFIGS[family]
    config = AutoConfig.for_model(model_type, **options)
    spec = ffn_spec(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert spec.intermediate_size(config) == INTERMEDIATE
    assert len(spec.decoder_layers(model)) == LAYERS
    parameters = dict(model.named_parameters())
    assert f"{spec.layers}.0.{spec.norm}.weight" in parameters
    for layer in range(LAYERS):
        for name in (spec.gate, spec.up) if spec.gated else (spec.up,):
            assert parameters[spec.projection(layer, name) + ".weight"].shape == (INTERMEDIATE, HIDDEN)
        assert spec.down_projection(model, layer).weight.shape == (HIDDEN, INTERMEDIATE)
        assert parameters[spec.projection(layer, spec.down) + ".weight"] is spec.down_projection(model, layer).weight


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_an_unknown_architecture_lists_the_known_ones(model_type):
    with pytest.raises(PartInferError) as raised:
        ffn_spec(AutoConfig.for_model(model_type))
    assert f"unknown architecture '{model_type}'" in str(raised.value)
    assert all(known in str(raised.value) for known in FAMILIES)
