"""Prompts that begin alike: what is reused, and that the answers do not show it, to the last bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import make_tiny_checkpoint
from tests.tiny_tokenizer import tiny_tokenizer
from tests.transformers_patches.model_passes import DATASET, METHODS, MODEL
from transformers_patches.config import PartInferConfig
from transformers_patches.generation.blocks import block_ends, turn_end
from transformers_patches.generation.generate import GenerationOptions, generate
from transformers_patches.generation.prefixes import Prefixes
from transformers_patches.load.loader import load_model

SYSTEM = [5 + i % 90 for i in range(140)]
FIRST, SECOND = SYSTEM + [20] * 20, SYSTEM + [30] * 25


def test_blocks_end_at_fixed_places():
    assert list(block_ends(0, 128)) == []
    assert list(block_ends(0, 129)) == [128]
    assert list(block_ends(0, 700)) == [128, 256, 512]
    assert list(block_ends(128, 256)) == []
    assert list(block_ends(130, 800)) == [256, 512, 768]
    assert list(block_ends(256, 513)) == [512]


def test_a_first_turn_is_a_block_of_its_own():
    assert list(block_ends(0, 300, 23)) == [23, 128, 256]
    assert list(block_ends(0, 23, 23)) == []
    assert list(block_ends(23, 40, 23)) == []
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 3]))
    assert turn_end(model, [9] * 30 + [3, 9, 2, 9]) == 31
    assert turn_end(model, [9] * 5 + [3] + [9] * 30 + [2]) == 37  # the first one is too short
    assert turn_end(model, [9] * 127 + [3]) is None
    model.generation_config.eos_token_id = None
    assert turn_end(model, [9] * 30) is None


@pytest.fixture(scope="module", params=["core", "blend", "up", "dense"])
def loaded(request, tmp_path_factory):
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("prefixes"), "llama")
    method = {"method": "dense"} if request.param == "dense" else METHODS["partinfer"] | {"selection": request.param}
    settings = PartInferConfig(**method, start_num=1, end_num=4, dtype="bfloat16", device="cpu")
    return load_model(folder, settings, DATASET, MODEL)


def answer(
    loaded, prompt: list[int], prefixes: Prefixes | None = None, end: int | None = None
) -> tuple[list[int], list[torch.Tensor]]:
    """The tokens of an answer, and the keys of the prompt. end: the token that ends turns."""
    prefixes = prefixes or Prefixes(loaded)
    loaded.model.generation_config.eos_token_id = end
    result = generate(loaded, tiny_tokenizer(), prompt, GenerationOptions(max_new_tokens=12), None, prefixes)
    return result.token_ids, [layer.keys[:, :, : len(prompt)].clone() for layer in prefixes._current.cache.layers]


def same(one, other) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_reuse_does_not_show(loaded):
    prefixes = Prefixes(loaded)
    for prompt, reused in (
        (FIRST, 0),
        (SECOND, 128),  # the same system prompt
        (SECOND, 128),  # again
        ([*FIRST, *range(40, 60)], 128),  # a chat's next turn
        ([7] * 10, 0),
        (FIRST[:130], 128),
        (SYSTEM[:128], 0),  # at least one token is left to be computed
    ):
        given = answer(loaded, prompt, prefixes)
        assert prefixes.reused == reused
        assert same(given, answer(loaded, prompt))


def test_short_system_prompts_are_reused(loaded):
    end = 3
    system, prefixes = [*SYSTEM[:30], end], Prefixes(loaded)
    first = [*system, 20, 21, end, 22]
    for prompt, reused in (
        (first, 0),
        ([*system, 30, 31, 32, end, 33], 31),
        (first, 31),
        ([*first, *range(40, 60), end, 61], 31),  # a chat's next turn
        ([*SYSTEM[:29], 4, end, 20], 0),
        ([*system, *SYSTEM], 31),
        ([*system, *SYSTEM, 9], 128),
        (system, 0),  # at least one token is left to be computed
    ):
        given = answer(loaded, prompt, prefixes, end)
        assert prefixes.reused == reused
        assert same(given, answer(loaded, prompt, end=end))


def test_evidence_belongs_to_its_setting(loaded):
    prefixes = Prefixes(loaded)
    answer(loaded, FIRST, prefixes)
    prefixes.setting = "another"
    answer(loaded, FIRST, prefixes)
    assert prefixes.reused == (0 if loaded.state.observes else 128)


def test_few_prompts_are_kept(loaded):
    prefixes = Prefixes(loaded)
    for token in range(5, 14):
        answer(loaded, [token] * 130, prefixes)
    assert len(prefixes._prompts) == 4
    assert answer(loaded, [13] * 130, prefixes)
    assert prefixes.reused == 128


def test_an_answer_that_fails_leaves_nothing(loaded):
    prefixes, expected = Prefixes(loaded), answer(loaded, FIRST)

    def fail() -> None:
        raise RuntimeError("gone")

    prefixes.between = fail
    with pytest.raises(RuntimeError, match="gone"):
        answer(loaded, FIRST, prefixes)
    prefixes.between = None
    assert prefixes._prompts == []
    assert same(answer(loaded, FIRST, prefixes), expected)
