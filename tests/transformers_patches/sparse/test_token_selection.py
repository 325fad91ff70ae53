"""Choosing per token: equal to plain transformers whose activations are masked token by token, and counted exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import FAMILIES, HIDDEN, INTERMEDIATE
from tests.transformers_patches.masked_reference import naive_plan
from tests.transformers_patches.model_passes import (
    DATASET,
    MODEL,
    SPARSE,
    assert_equal_where_real,
    padded_prompts,
    passes,
    run,
)
from tests.transformers_patches.token_reference import TokenReference
from transformers_patches import kernels
from transformers_patches.errors import PartInferError
from transformers_patches.plan.load_plan import kept_count

LOADED, KEPT = 56, 20  # 0.7 of 80; (3 * 0.4 * 80 - 56) / 2
KEPT_PLAIN = 8  # 2 * 0.4 * 80 - 56
GAMMAS = [0.7, 0.9]  # with 0.9, more is loaded than tokens choose among: the prompt chooses their candidates


def token_reference(checkpoints, family: str, by: str) -> TokenReference:
    reference = TokenReference(checkpoints[family])
    reference.by = by
    for layer in SPARSE:
        ranking, other = DATASET.ranking[layer].tolist(), MODEL.ranking[layer].tolist()
        reference.loaded[layer] = naive_plan(ranking, other, 0.3, 0.7)
        reference.kept[layer] = KEPT_PLAIN if family == "opt" else KEPT
    return reference


@pytest.mark.parametrize("lengths, side", [([7], "left"), ([7, 3, 1], "left"), ([5, 9, 2], "right")])
@pytest.mark.parametrize("by", ["up", "gate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_model_masked_token_by_token(family, by, lengths, side, loaded, tiny_checkpoints):
    # single tokens, a few, and more than the gathering path takes
    all_passes = passes(*padded_prompts(lengths, side), [1, 3, 10])
    with torch.no_grad():
        expected = token_reference(tiny_checkpoints, family, by).run(all_passes)
    ours = loaded(family, "partinfer", selection=by)
    assert_equal_where_real(run(ours.model, all_passes), expected, all_passes[0][1]["attention_mask"])


@pytest.mark.parametrize(
    "family, kept, matrices", [("llama", KEPT, 3), ("llama-mlp-bias", KEPT, 3), ("opt", KEPT_PLAIN, 2)]
)
def test_exactly_the_budget_is_read(family, kept, matrices, loaded):
    ours = loaded(family, "partinfer", selection="up")
    past = None
    ours.reset_counters()
    for number, (input_ids, kwargs) in enumerate(passes(*padded_prompts([5, 3], "left"), [1, 2])):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            past = ours.model(input_ids=input_ids, past_key_values=past, use_cache=True, **kwargs).past_key_values
        if number:
            place = "model.decoder.layers.2.fc1" if family == "opt" else "model.layers.2.mlp"
            operations = sum(counter.get_flop_counts()[f"{type(ours.model).__name__}.{place}"].values())
            assert operations / (2 * HIDDEN * input_ids.numel()) == LOADED + kept * (matrices - 1)
    tokens = 2 * 3
    for layer in ours.state.layers:
        assert (layer.counters.tokens, layer.counters.neurons) == (tokens, tokens * kept)
    assert ours.bytes_fraction() == pytest.approx(0.4)
    assert ours.computed_fraction() == pytest.approx(kept / INTERMEDIATE)


def test_candidates_chosen_by_the_prompt(loaded):
    """72 loaded neurons are more than 1.75 · 0.4 · 80 = 56 candidates, of which (96 - 56) / 2 = 20 are kept; both sets
    lie in the loaded ones, base always a candidate."""
    ours = loaded("llama", "partinfer", selection="up", loaded_neurons_percent=0.9)
    plan = ours.plan.layers[2]
    assert (plan.candidate_count, plan.computed_count, plan.base_count) == (56, 20, 24)
    ours.reset_counters()
    run(ours.model, passes(*padded_prompts([6, 4], "left"), [1, 12]))
    for chosen in ours.state.layers[1].selection.selected:
        assert len(chosen) == 32
        assert int(chosen.min()) >= 24
        assert int(chosen.max()) < 72
    assert ours.bytes_fraction() == pytest.approx(0.4)
    everything = loaded("llama", "partinfer", selection="up", loaded_neurons_percent=0.7)
    assert everything.state.layers[1].selection.all_are_candidates


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_step_by_step_one_pass_and_batches_agree(family, gamma, loaded):
    ours = loaded(family, "partinfer", selection="up", loaded_neurons_percent=gamma).model
    input_ids, mask = padded_prompts([6, 2, 4], "left")
    steps = run(ours, passes(input_ids, mask, [1] * 12))
    whole = run(ours, passes(input_ids, mask, [12]))
    # the same random tokens, drawn in another order: feed those of the single steps in one pass
    all_passes = passes(input_ids, mask, [1] * 12)
    together = torch.cat([ids for ids, _ in all_passes[1:]], dim=1)
    one = [all_passes[0], (together, passes(input_ids, mask, [12])[1][1])]
    whole = run(ours, one)
    assert (torch.cat(steps[1:], dim=1) - whole[1]).abs().max() < 1e-5
    for row, length in enumerate([6, 2, 4]):
        alone_ids = input_ids[row : row + 1, -length:]
        alone = [(alone_ids, {"attention_mask": torch.ones_like(alone_ids)})]
        alone.append((together[row : row + 1], {}))
        assert (run(ours, alone)[1] - whole[1][row : row + 1]).abs().max() < 1e-5


def test_requests_do_not_see_each_other_even_when_interrupted(loaded):
    ours = loaded("qwen2", "partinfer", selection="up", loaded_neurons_percent=0.9).model
    first, second = (passes(*padded_prompts([length], "left", seed=length), [1, 1]) for length in (5, 8))
    expected = run(ours, first)
    run(ours, second[:1])  # ended after its prompt
    assert all(torch.equal(a, b) for a, b in zip(run(ours, first), expected, strict=True))


@pytest.mark.skipif(not kernels.available(), reason="no native kernels here")
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("family", ["llama", "llama-mlp-bias", "opt", "gemma2"])
def test_native_kernels_give_the_same(family, gamma, loaded):
    all_passes = passes(*padded_prompts([7, 3], "left"), [1, 1, 2])
    settings = {"selection": "up", "loaded_neurons_percent": gamma}
    native, reference = (loaded(family, "partinfer", kernels=kernel, **settings) for kernel in ("native", "torch"))
    for a, b in zip(run(native.model, all_passes), run(reference.model, all_passes), strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_threshold_keeps_the_count_on_average_over_the_prompt(family, loaded):
    """Decoding the prompt's own last tokens once more meets the threshold that they gave."""
    ours = loaded(family, "partinfer", selection="up", token_count="average")
    layer, kept = ours.state.layers[0], KEPT_PLAIN if family == "opt" else KEPT
    x = torch.randn(1, 40, HIDDEN, generator=torch.Generator().manual_seed(1))
    ours.state.begin_pass(1, 40, 0, None)
    layer(x)
    result = layer.selection.decode(x)
    assert result.computed == kept * 40
    assert result.rows == LOADED * 40 + kept * 40 * (layer.rows.matrices - 1)
    each = [layer.selection.decode(x[:, t : t + 1]) for t in range(40)]
    assert sum(one.computed for one in each) == kept * 40
    assert len({one.computed for one in each}) > 1
    assert (torch.cat([one.y for one in each], dim=1) - result.y).abs().max() < 1e-5


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_threshold_after_a_short_prompt_is_the_exact_count(gamma, loaded):
    all_passes = passes(*padded_prompts([7, 3], "left"), [1, 2])
    average, exact = (
        loaded("llama", "partinfer", selection="up", loaded_neurons_percent=gamma, token_count=count)
        for count in ("average", "exact")
    )
    for a, b in zip(run(average.model, all_passes), run(exact.model, all_passes), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [3, 16, 64])
def test_the_threshold_of_a_fit_is_blended_with_that_of_the_prompt(tokens, loaded):
    ours = loaded("llama", "partinfer", selection="up", token_count="average")
    layer, x = ours.state.layers[0], torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(1))

    def threshold(known: float | None) -> float | None:
        layer.reset(), setattr(layer.selection.prior, "threshold", known)
        ours.state.begin_pass(1, tokens, 0, None)
        layer(x)
        return layer.selection.thresholds[0]

    try:
        alone, blended = threshold(None), threshold(0.125)
    finally:
        threshold(None)
    if tokens < 8:  # too few to tell: the fit's own
        assert (alone, blended) == (None, 0.125)
    else:
        assert math.log(blended) == pytest.approx((64 * math.log(0.125) + tokens * math.log(alone)) / (64 + tokens))


@pytest.mark.skipif(not kernels.available(), reason="no native kernels here")
@pytest.mark.parametrize("gamma", GAMMAS)
def test_native_kernels_take_thresholds(gamma, loaded):
    all_passes = passes(*padded_prompts([30, 12], "left"), [1, 1, 2])
    native, reference = (
        loaded(
            "llama", "partinfer", kernels=kernel, selection="up", loaded_neurons_percent=gamma, token_count="average"
        )
        for kernel in ("native", "torch")
    )
    for ours in (native, reference):
        ours.reset_counters()
    for a, b in zip(run(native.model, all_passes), run(reference.model, all_passes), strict=True):
        assert (a - b).abs().max() < 1e-4
    assert native.computed_fraction() == reference.computed_fraction() != KEPT / INTERMEDIATE


def test_decoding_without_a_prompt_is_an_error(loaded):
    ours = loaded("llama", "partinfer", selection="up")
    ours.state.begin_pass(1, 1, 0, None)
    ours.state.phase = "decode"
    with pytest.raises(RuntimeError, match="decoding without a prefilled prompt"):
        ours.state.layers[0](torch.zeros(1, 1, HIDDEN))


@given(
    sparsity=st.floats(0.05, 1), share=st.floats(0.05, 1), size=st.integers(50, 5000), matrices=st.sampled_from([2, 3])
)
def test_kept_neurons_meet_the_budget(sparsity, share, size, matrices):
    candidates = max(1, round(share * size))
    try:
        kept = kept_count(sparsity, candidates, size, matrices)
    except PartInferError:
        assert candidates + 0.5 * (matrices - 1) >= matrices * sparsity * size - 1e-6
        return
    read = candidates + kept * (matrices - 1)
    assert 1 <= kept <= candidates
    assert read <= matrices * sparsity * size + matrices / 2 + 1e-6
    if kept < candidates:
        assert read >= matrices * sparsity * size - matrices / 2 - 1e-6


def test_a_budget_for_candidates_alone_is_an_error(loaded):
    with pytest.raises(
        PartInferError, match="one projection of 1 candidates takes all of sparsity 0: give more --spars"
    ):
        loaded("llama", "partinfer", selection="up", sparsity=0.0, base_neurons_percent=0.0)
