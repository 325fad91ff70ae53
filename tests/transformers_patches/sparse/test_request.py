"""Requests: what is prefill, what is decode, and that one request never touches another."""

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tests.conftest import FAMILIES
from tests.transformers_patches.masked_reference import positions
from tests.transformers_patches.model_passes import (
    SPARSE,
    naive,
    padded_prompts,
    passes,
    run,
    selection_of,
)

NEW_TOKENS = 6


def generate(ours, input_ids, attention_mask=None, **options) -> list[list[int]]:
    """Greedily generated ids of each sequence, never ended early."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    output = ours.model.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        **options,
    )
    return output[:, input_ids.shape[1] :].tolist()


def selections(ours, batch: int) -> list[list[set[int]]]:
    """Per sequence, the neurons of every sparse layer."""
    by_layer = [selection_of(ours, layer, batch) for layer in SPARSE]
    return [list(of_sequence) for of_sequence in zip(*by_layer, strict=True)]


@pytest.mark.parametrize("method", ["partinfer", "coreinfer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_selection_and_tokens_do_not_depend_on_the_batch(family, method, loaded):
    ours = loaded(family, method)
    input_ids, attention_mask = padded_prompts([8, 3, 1], "left", seed=5)
    together = generate(ours, input_ids, attention_mask)
    chosen = selections(ours, 3)
    assert chosen[0] != chosen[1]
    for row, length in enumerate([8, 3, 1]):
        alone = input_ids[row : row + 1, -length:]
        assert generate(ours, alone) == [together[row]]
        assert selections(ours, 1) == [chosen[row]]
    longer = torch.nn.functional.pad(input_ids[1:], (5, 0)), torch.nn.functional.pad(attention_mask[1:], (5, 0))
    assert generate(ours, *longer) == together[1:]
    assert selections(ours, 2) == chosen[1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_side_of_the_padding_does_not_matter(family, loaded):
    ours = loaded(family, "partinfer")
    chosen, logits = {}, {}
    for side in ("left", "right"):
        input_ids, attention_mask = padded_prompts([4, 7, 1], side, seed=6)
        logits[side] = run(ours.model, passes(input_ids, attention_mask, [1, 2]))
        chosen[side] = selections(ours, 3)
    assert chosen["left"] == chosen["right"]
    for a, b in zip(logits["left"][1:], logits["right"][1:], strict=True):
        assert (a - b).abs().max() < 1e-4


class InterruptingStreamer(BaseStreamer):
    """Ctrl-C after some tokens (the prompt arrives first)."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


class InterruptingCriteria(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise KeyboardInterrupt


def interrupt_in_layer(ours, layer: int, call: int):
    """Ctrl-C within a forward pass, when `layer` is called for the given time."""
    calls = iter(range(call + 1))

    def hook(module, args):
        if next(calls) == call:
            raise KeyboardInterrupt

    return ours.state.layers[layer].register_forward_pre_hook(hook)


A = torch.tensor([[5, 17, 99, 42, 8]])
B = torch.tensor([[77, 3, 61, 12, 13, 14, 100, 101], [9, 10, 11, 12, 50, 51, 52, 53]])


@pytest.mark.parametrize("method", ["partinfer", "coreinfer"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_b_a_gives_the_tokens_of_a_twice(family, method, loaded):
    ours = loaded(family, method)
    first = generate(ours, A)
    between = generate(ours, B)
    assert generate(ours, A) == first
    assert generate(ours, B) == between


@pytest.mark.parametrize("where", ["first token", "third token", "stopping", "prefill", "decode", "expected prompt"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_interrupted_request_leaves_the_next_one_unaffected(family, where, loaded):
    ours = loaded(family, "partinfer")
    first, chosen = generate(ours, A), None
    chosen = selections(ours, 1)
    hook = {"prefill": lambda: interrupt_in_layer(ours, 2, 0), "decode": lambda: interrupt_in_layer(ours, 1, 3)}
    handle = hook[where]() if where in hook else None

    def interrupted():
        if where == "expected prompt":
            with ours.state.expect_prompt(20):
                generate(ours, B, streamer=None, stopping_criteria=[InterruptingCriteria()])
        elif where == "stopping":
            generate(ours, B, stopping_criteria=[InterruptingCriteria()])
        elif handle:
            generate(ours, B)
        else:
            generate(ours, B[:1], streamer=InterruptingStreamer({"first token": 1, "third token": 3}[where]))

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    if handle:
        handle.remove()
    assert generate(ours, A) == first
    assert selections(ours, 1) == chosen


def phases(ours, calls) -> list[tuple[str, int, int]]:
    """(phase, batch, tokens) of every forward pass that `calls` makes."""
    seen = []
    handle = ours.state.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append((ours.state.phase, ours.state.batch, ours.state.tokens))
    )
    try:
        calls()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("prompt", [A, B, A[:, :1]])
def test_generation_is_one_prefill_and_then_decoding(prompt, loaded):
    ours = loaded("llama", "partinfer")
    batch, tokens = prompt.shape
    expected = [("prefill", batch, tokens)] + [("decode", batch, 1)] * (NEW_TOKENS - 1)
    assert phases(ours, lambda: generate(ours, prompt)) == expected


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_positional_arguments_are_understood(family, loaded):
    ours = loaded(family, "partinfer")
    cache, mask = DynamicCache(config=ours.model.config), torch.ones(1, 5, dtype=torch.int64)

    def calls():
        longer = torch.ones(1, 6, dtype=torch.int64)
        if family == "opt":
            ours.model(A, mask, cache)
            ours.model(A[:, :1], longer, cache)
        else:
            ours.model(A, mask, None, cache)
            ours.model(A[:, :1], longer, None, cache)

    assert phases(ours, calls) == [("prefill", 1, 5), ("decode", 1, 1)]


@torch.no_grad()
def test_embeddings_are_a_prompt_too(loaded):
    ours = loaded("llama", "partinfer")
    ours.model(A)
    chosen = selections(ours, 1)
    ours.model(B)
    embeddings = ours.model.get_input_embeddings()(A)
    assert phases(ours, lambda: ours.model(inputs_embeds=embeddings)) == [("prefill", 1, 5)]
    assert selections(ours, 1) == chosen


def slices(input_ids, attention_mask, ends: list[int]) -> list[tuple[torch.Tensor, dict]]:
    """Passes over consecutive parts of a sequence that end at `ends`."""
    place = positions(attention_mask)
    return [
        (
            input_ids[:, start:end],
            {"attention_mask": attention_mask[:, :end], "position_ids": place[:, start:end]},
        )
        for start, end in zip([0, *ends], ends, strict=False)
    ]


@torch.no_grad()
@pytest.mark.parametrize("method", ["partinfer", "coreinfer", "coreinfer+partial"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_prompt_in_chunks_is_prefill_to_its_end(family, method, loaded, references):
    ours, reference, formula = loaded(family, method), references(family), naive(method)
    input_ids, attention_mask = padded_prompts([9, 4, 1], "left", seed=7)
    chunks = slices(input_ids, attention_mask, [4, 8, 9])  # the first is padding alone for two of the sequences
    (after,) = passes(input_ids, attention_mask, [2])[1:]

    cache = DynamicCache(config=ours.model.config)

    def calls():
        with ours.state.expect_prompt(9):
            for ids, kwargs in chunks:
                ours.model(ids, past_key_values=cache, **kwargs)

    assert [phase for phase, _, _ in phases(ours, calls)] == ["prefill"] * 3
    with reference.fresh():
        output = formula.prefill(reference, chunks)
        assert selections(ours, 3) == [list(s) for s in zip(*formula.selected.values(), strict=True)]
        expected = reference(after[0], past_key_values=output.past_key_values, **after[1]).logits
    logits = ours.model(after[0], past_key_values=cache, **after[1]).logits
    assert (logits - expected).abs().max() < 1e-5
    assert ours.state.phase == "decode"


@torch.no_grad()
@pytest.mark.parametrize("method", ["partinfer", "coreinfer"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_later_turn_of_a_chat_is_prefilled_onto_the_cache(family, method, loaded, references):
    """Turn 1 (5 tokens), 2 decoded, turn 2 (3 tokens), 2 decoded: the second selection counts both turns' tokens."""
    ours, reference, formula = loaded(family, method), references(family), naive(method)
    input_ids, attention_mask = padded_prompts([12], "left", seed=8)
    turn1, answer1, turn2, answer2 = slices(input_ids, attention_mask, [5, 7, 10, 12])

    cache, logits = DynamicCache(config=ours.model.config), []

    def calls():
        for (ids, kwargs), prompt_length in ((turn1, None), (answer1, None), (turn2, 10), (answer2, None)):
            if prompt_length:
                with ours.state.expect_prompt(prompt_length):
                    logits.append(ours.model(ids, past_key_values=cache, **kwargs).logits)
            else:
                logits.append(ours.model(ids, past_key_values=cache, **kwargs).logits)

    assert [phase for phase, _, _ in phases(ours, calls)] == ["prefill", "decode", "prefill", "decode"]

    with reference.fresh():
        output = formula.prefill(reference, [turn1])
        expected = [output.logits]
        first_turn = dict(formula.selected)
        output = reference(answer1[0], past_key_values=output.past_key_values, **answer1[1])
        expected.append(output.logits)
        output = formula.prefill(reference, [turn2], output.past_key_values)
        expected.append(output.logits)
        output = reference(answer2[0], past_key_values=output.past_key_values, **answer2[1])
        expected.append(output.logits)
    assert formula.selected != first_turn
    for a, b in zip(logits, expected, strict=True):
        assert (a - b).abs().max() < 1e-5


@torch.no_grad()
def test_tokens_over_a_cache_are_decoded_unless_a_prompt_is_expected(loaded):
    ours = loaded("llama", "partinfer")
    cache = DynamicCache(config=ours.model.config)

    def calls():
        ours.model(A, past_key_values=cache)
        with ours.state.expect_prompt(5):  # is already there
            ours.model(B[:1], past_key_values=cache)
        ours.model(B[:1, :1], past_key_values=cache)

    assert [phase for phase, _, _ in phases(ours, calls)] == ["prefill", "decode", "decode"]


@torch.no_grad()
def test_a_cache_of_another_batch_is_an_error(loaded):
    ours = loaded("llama", "partinfer")
    cache = ours.model(A, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache was prefilled for 1 sequences, this pass has 2"):
        ours.model(B, past_key_values=cache)


@torch.no_grad()
def test_a_mask_of_another_rank_is_an_error(loaded):
    ours = loaded("llama", "partinfer")
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\], got shape \[1, 1, 5, 5\]"):
        ours.model(A, attention_mask=torch.ones(1, 1, 5, 5))
