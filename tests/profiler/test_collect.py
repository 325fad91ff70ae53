"""The Collector against activations that are computed from the FFNs' inputs, one text at a time, for every family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from profiler.collect import Collector, until_end, with_continuations
from profiler.statistics import ActivationStatistics
from transformers_patches.families import family_of
from transformers_patches.neurons.neuron_file import INPUT_SQUARES

LENGTHS = (7, 1, 12, 4)


def texts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def greedy(model, ids: list[int], new_tokens: int) -> list[int]:
    """Prompt and continuation, the whole text through the model at each step."""
    ids = list(ids)
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids


@torch.no_grad()
def activations(model, ids: list[int]) -> torch.Tensor:
    """h [layers, T, N], computed from what enters each FFN."""
    family, inputs = family_of(model.config), []
    act = ACT2FN[family.activation(model.config)]
    handles = []
    for layer in range(model.config.num_hidden_layers):
        up = getattr(family.ffn_module(model, layer), family.up)
        handles.append(up.register_forward_hook(lambda module, args, output: inputs.append(args[0])))
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    h = []
    for layer, x in enumerate(inputs):
        ffn = family.ffn_module(model, layer)
        up = getattr(ffn, family.up)(x)
        h.append(act(getattr(ffn, family.gate)(x)) * up if family.gated else act(up))
    return torch.stack([values.reshape(len(ids), -1) for values in h])


@pytest.mark.parametrize("new_tokens", [0, 6])
def test_every_token_counts_once_and_padding_never(checkpoint, new_tokens):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    size = family_of(model.config).intermediate_size(model.config)
    statistics = ActivationStatistics(model.config.num_hidden_layers, size)
    prompts = texts(model.config.vocab_size)
    tokens = Collector(model, statistics, new_tokens).observe(prompts)
    statistics.commit(tokens)

    whole = [greedy(model, ids, new_tokens) for ids in prompts]
    assert tokens == sum(len(ids) for ids in whole)
    h = torch.cat([activations(model, ids) for ids in whole], dim=1).double()
    means = statistics.means()
    scale = h.abs().mean(1).max()
    assert float((means["mean_abs"] - h.abs().mean(1)).abs().max() / scale) < 1e-5
    assert float((means["mean"] - h.mean(1)).abs().max() / scale) < 1e-5
    normalized = torch.nn.functional.normalize(h, dim=-1).square().mean(1)
    torch.testing.assert_close(means["normalized_mean_sq"].double(), normalized, rtol=1e-4, atol=1e-6)


def test_squares_of_inputs_are_those_of_all_linear_layers(checkpoint):
    """Against hooks on every linear layer, one text at a time through the whole model."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    prompts, inputs = texts(model.config.vocab_size), {}
    collector = Collector.of(model, 0)
    collector.statistics.commit(collector.observe(prompts))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            parts = inputs[name] = []
            module.register_forward_pre_hook(lambda _, args, parts=parts: parts.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for ids in prompts:
            model(torch.tensor([ids]))
    squares = {name: torch.cat(parts).double().square().mean(0) for name, parts in inputs.items()}
    measured, family, checked = collector.statistics.input_squares(), family_of(model.config), {"lm_head"}
    assert set(measured) == set(INPUT_SQUARES)
    torch.testing.assert_close(measured["head"][0].double(), squares["lm_head"], rtol=1e-4, atol=1e-9)
    for name, places in family.inputs().items():
        for layer in range(model.config.num_hidden_layers):
            for linear in (f"{family.layers}.{layer}.{place}" for place in places):
                if linear in squares:
                    torch.testing.assert_close(measured[name][layer].double(), squares[linear], rtol=1e-4, atol=1e-9)
                    checked.add(linear)
    assert {name for name in squares if name not in checked} == {
        family.projection(layer, family.down) for layer in range(model.config.num_hidden_layers)
    }


def test_tokens_after_the_first_end_token_do_not_count():
    assert until_end([5, 6, 2, 7, 2], {2, 3}) == [5, 6, 2]
    assert until_end([5, 6], {2}) == [5, 6]
    assert until_end([3, 1], {2, 3}) == [3]


def test_generation_settings_of_the_model_are_not_used(tiny_checkpoints):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints["llama"]).eval()
    prompts = texts(model.config.vocab_size)
    plain = with_continuations(model, prompts, 6)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert with_continuations(model, prompts, 6) == plain
