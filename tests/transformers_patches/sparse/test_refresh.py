"""Choosing again while decoding: the same however tokens are spread over passes, and from the prompt's end again."""

import pytest
import torch

from tests.conftest import INTERMEDIATE
from tests.transformers_patches.model_passes import padded_prompts, passes, run

SELECTIONS = [("core", None), ("griffin", None), ("up", None), ("up", 0.55)]


def selected(ours) -> list:
    kind = ours.state.layers[0].selection
    return [layer.selection.selected or layer.selection.scales for layer in ours.state.layers] if kind else []


def flat(parts) -> torch.Tensor:
    return torch.cat([torch.cat([part.float() for part in layer]) for layer in parts])


@pytest.mark.parametrize("selection, candidates", SELECTIONS)
def test_passes_of_any_size_give_the_same(selection, candidates, loaded):
    ours = loaded("llama", "partinfer", selection=selection, candidates=candidates, refresh=4)
    prompt = padded_prompts([6, 3], "left")
    steps = passes(*prompt, [1] * 11)
    expected = run(ours.model, steps)
    tokens = torch.cat([ids for ids, _ in steps[1:]], dim=1)
    for sizes in ([11], [3, 8], [4, 4, 3]):
        chunks = tokens.split(sizes, dim=1)
        cut = [(chunk, kwargs) for chunk, (_, kwargs) in zip(chunks, passes(*prompt, sizes)[1:], strict=True)]
        got = run(ours.model, [steps[0], *cut])
        assert (torch.cat(got[1:], dim=1) - torch.cat(expected[1:], dim=1)).abs().max() < 1e-5


@pytest.mark.parametrize("selection, candidates", SELECTIONS)
def test_the_choice_changes_and_a_cut_cache_begins_again(selection, candidates, loaded):
    ours = loaded("qwen2", "partinfer", selection=selection, candidates=candidates, refresh=4)
    prompt, first, second = passes(*padded_prompts([5], "left"), [9, 9])
    with torch.no_grad():
        cache = ours.model(input_ids=prompt[0], use_cache=True, **prompt[1]).past_key_values
        at_start = flat(selected(ours))
        logits = ours.model(input_ids=first[0], past_key_values=cache, **first[1]).logits
        assert not torch.equal(flat(selected(ours)), at_start)
        cache.crop(-9)
        again = ours.model(input_ids=first[0], past_key_values=cache, **first[1]).logits
    assert torch.equal(again, logits)


def test_what_it_reads_is_counted(loaded):
    ours = loaded("llama", "partinfer", refresh=4)
    ours.reset_counters()
    run(ours.model, passes(*padded_prompts([5, 3], "left"), [1, 8]))
    # 9 tokens of 2 sequences, 32 neurons each; twice gate and up of 56 neurons
    expected = (9 * 2 * 32 * 3 + 2 * 2 * 56 * 2) / (9 * 2 * 3 * INTERMEDIATE)
    assert ours.bytes_fraction() == pytest.approx(expected)
    assert ours.computed_fraction() == pytest.approx(0.4)


def test_without_refresh_the_choice_stays(loaded):
    ours = loaded("llama", "partinfer")
    prompt, first = passes(*padded_prompts([5], "left"), [9])
    run(ours.model, [prompt])
    before = flat(selected(ours))
    run(ours.model, [prompt, first])
    assert torch.equal(flat(selected(ours)), before)
