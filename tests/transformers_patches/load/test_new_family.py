"""A family that nobody has heard of: it runs in transformers' own layers, and with an entry in FAMILIES natively."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

from profiler.collect import Collector
from tests.conftest import FAMILY_CONFIGS
from tests.transformers_patches.model_passes import PROMPT, logits
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.families import FAMILIES, Family, GGUFLayout, gguf_family
from transformers_patches.fast_pass.one_token import new_cache, one_token_pass
from transformers_patches.load.loader import load_model

SHAPE = {"start_num": 1, "end_num": 4, "device": "cpu", "dtype": "float32"}


class MadeUpConfig(LlamaConfig):
    model_type = "made_up"


class MadeUpFeedForward(nn.Module):
    """A Llama's FFN under other names."""

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.nonlinearity = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.nonlinearity(self.w1(x)) * self.w3(x))


class MadeUpForCausalLM(LlamaForCausalLM):
    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = MadeUpFeedForward(config)
        self.post_init()


AutoConfig.register("made_up", MadeUpConfig)
AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("made_up")
    torch.manual_seed(0)
    MadeUpForCausalLM(MadeUpConfig(**FAMILY_CONFIGS["llama"][1])).save_pretrained(place)
    return place


@pytest.fixture
def known(monkeypatch) -> Family:
    """The one entry that a family needs."""
    family = Family(
        native_decoder=True, gate="w1", up="w3", down="w2", activation_module="nonlinearity", gguf=GGUFLayout("made-up")
    )
    monkeypatch.setitem(FAMILIES, "made_up", family)
    return family


def test_without_an_entry_it_runs_in_transformers_own_layers(folder, neuron_files):
    settings = PartInferConfig(method="dense", use_partial_loading=True, loaded_neurons_percent=1.0, **SHAPE)
    loaded = load_model(folder, settings, **neuron_files)
    assert one_token_pass(loaded.model) is None
    assert (loaded.run.family.gate, loaded.run.family.up, loaded.run.family.down) == ("w1", "w3", "w2")
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.cat([PROMPT, torch.tensor([[7]])], 1)).logits[0]
    assert (logits(loaded) - expected).abs().max() < 1e-4


def test_all_neurons_in_sparse_ffns_are_what_transformers_computes(folder, known, neuron_files):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    settings = PartInferConfig(
        method="dense", use_partial_loading=True, loaded_neurons_percent=1.0, kernels="torch", **SHAPE
    )
    loaded = load_model(folder, settings, **neuron_files)
    assert len(loaded.state.layers) == 4
    with torch.inference_mode():
        expected = plain(torch.cat([PROMPT, torch.tensor([[7]])], 1)).logits[0]
    assert (logits(loaded) - expected).abs().max() < 1e-4


@pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.why_not()}")
def test_sparse_layers_run_in_the_native_decoder(folder, known, neuron_files):
    settings = {"kernels": "native", **SHAPE}
    loaded = load_model(folder, PartInferConfig(method="partinfer", **settings), **neuron_files)
    assert one_token_pass(loaded.model) is not None
    steps = []
    for cache in (new_cache(loaded.model), DynamicCache()):
        with torch.inference_mode():
            loaded.model(PROMPT, past_key_values=cache, use_cache=True)
            steps.append(loaded.model(torch.tensor([[7]]), past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)
    assert loaded.computed_fraction() == pytest.approx(0.4)


def test_it_is_profiled(folder, known):
    collector = Collector.of(AutoModelForCausalLM.from_pretrained(folder), max_new_tokens=2)
    assert collector.observe([[5, 6, 7]]) == 5
    assert set(collector.statistics.inputs) == {"attention", "attention_output", "ffn", "head"}


def test_its_gguf_files_have_their_names(known):
    names = gguf_family("made-up").gguf_names()
    assert (names["blk.ffn_gate"], names["blk.ffn_down"]) == ("mlp.w1", "mlp.w2")
