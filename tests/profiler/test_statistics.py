"""ActivationStatistics against plain sums in float64."""

from __future__ import annotations

import pytest
import torch

from profiler.statistics import ActivationStatistics, NonFiniteActivation, block_sums
from transformers_patches.neurons.neuron_file import ACTIVATION_STATISTICS

LAYERS, SIZE = 2, 12


def activations(tokens: int, seed: int = 0) -> torch.Tensor:
    """[LAYERS, tokens, SIZE] with scales that differ by token, one token all zeros."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(LAYERS, tokens, SIZE, generator=generator) * torch.logspace(-3, 3, tokens)[:, None]
    h[:, 1] = 0
    return h


def expected_means(h: torch.Tensor) -> dict[str, torch.Tensor]:
    h = h.double()
    normalized = torch.nn.functional.normalize(h, dim=-1)
    values = (h.abs(), h, h**2, normalized.abs(), normalized, normalized**2)
    return {name: v.mean(1) for name, v in zip(ACTIVATION_STATISTICS, values, strict=True)}


def filled(parts: list[torch.Tensor]) -> ActivationStatistics:
    statistics = ActivationStatistics(LAYERS, SIZE, {"ffn": SIZE})
    for part in parts:
        for layer in range(LAYERS):
            statistics.observe(layer, part[layer])
            statistics.observe_input("ffn", layer, part[layer])
        statistics.commit(part.shape[1])
    return statistics


@pytest.mark.parametrize("sizes", [[300], [1, 299], [100, 100, 100]])
def test_means_are_those_of_all_tokens_however_they_come(sizes):
    h = activations(300)
    statistics = filled(list(h.split(sizes, dim=1)))
    assert statistics.tokens == 300
    for name, expected in expected_means(h).items():
        torch.testing.assert_close(statistics.means()[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_blocks_of_rows_add_up(monkeypatch):
    h = activations(300)
    monkeypatch.setattr("profiler.statistics.CPU_ELEMENTS", 7 * SIZE)  # 43 blocks, the last one smaller
    for name, expected in expected_means(h).items():
        torch.testing.assert_close(filled([h]).means()[name].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations_are_summed_in_float32(dtype):
    h = torch.full((4096, SIZE), 0.01).to(dtype)  # a sum in float16 or bfloat16 would stop growing long before
    sums = block_sums(h, torch.empty(4096, SIZE))
    assert sums[0, 0] == pytest.approx(4096 * float(h[0, 0]), rel=1e-5)


def test_activations_that_are_observed_stay_as_they_are():
    h = activations(300)
    before = h.clone()
    filled([h])
    assert torch.equal(h, before)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_squares_of_inputs_are_summed_by_name_and_layer(monkeypatch):
    monkeypatch.setattr("profiler.statistics.CPU_ELEMENTS", 7 * 5)  # 43 blocks, the last one smaller
    statistics = ActivationStatistics(LAYERS, SIZE, {"ffn": 5, "attention": 5, "head": 3})
    x, head = activations(300)[..., :5], activations(300, seed=1)[0, :, :3]
    for part, rest in zip(x.split(100, dim=1), head.split(100), strict=True):
        for layer in range(LAYERS):
            statistics.observe_input("ffn", layer, part[layer])
        statistics.observe_input("head", 0, rest)
        statistics.commit(100)
    squares = statistics.input_squares()
    torch.testing.assert_close(squares["ffn"].double(), x.double().square().mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(squares["head"][0].double(), head.double().square().mean(0), rtol=1e-5, atol=0)
    assert torch.equal(squares["attention"], torch.zeros(LAYERS, 5))  # nothing was observed
    statistics.observe_input("head", 0, torch.tensor([[1.0, float("nan"), 1.0]]))
    with pytest.raises(NonFiniteActivation) as caught:
        statistics.commit(1)
    assert caught.value.layer == LAYERS - 1


def test_pending_sums_count_only_when_committed():
    statistics = filled([activations(10)])
    before = statistics.sums()
    statistics.observe(0, activations(5, seed=1)[0])
    statistics.discard()
    statistics.commit(0)
    assert same(statistics.sums(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_name_their_layer_and_are_not_taken(bad):
    statistics = filled([activations(10)])
    before = statistics.sums()
    h = activations(5)
    h[1, 3, 7] = bad
    for layer in range(LAYERS):
        statistics.observe(layer, h[layer])
    with pytest.raises(NonFiniteActivation) as caught:
        statistics.commit(5)
    assert caught.value.layer == 1
    assert same(statistics.sums(), before)
    assert statistics.tokens == 10


def test_restored_statistics_go_on_exactly():
    parts = list(activations(90).split(30, dim=1))
    first = filled(parts[:2])
    second = ActivationStatistics(LAYERS, SIZE, {"ffn": SIZE})
    second.restore(first.sums(), first.tokens)
    for statistics in (first, second):
        for layer in range(LAYERS):
            statistics.observe(layer, parts[2][layer])
            statistics.observe_input("ffn", layer, parts[2][layer])
        statistics.commit(30)
    assert same(first.sums(), second.sums())
    assert first.tokens == second.tokens == 90
