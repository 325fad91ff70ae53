"""The loop for one sequence gives what transformers' own gives, and is left wherever it is not made for the call."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from tests.tiny_tokenizer import tiny_tokenizer
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.fast_pass.one_token import OneTokenPass, new_cache
from transformers_patches.generation import generate as generating
from transformers_patches.generation.decoding_loop import _Loop
from transformers_patches.generation.generate import generate_ids
from transformers_patches.load.loader import load_model

PROMPT = torch.tensor([[5, 17, 33, 40, 21, 9]])
pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.why_not()}")

CHOICES = {
    "greedy": {},
    "an end token": {"eos_token_id": None},  # filled in by the test
    "sampled": {"do_sample": True, "temperature": 0.8},
    "sampled from a few": {"do_sample": True, "top_k": 20, "top_p": 0.9},
    "no token twice": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1},
    "at least so many": {"min_new_tokens": 5, "eos_token_id": list(range(0, 128, 3))},
}


class Puts(BaseStreamer):
    """What a streamer is given; `meanwhile` is called at the third token."""

    def __init__(self, meanwhile=None) -> None:
        self.values, self.ended, self.meanwhile = [], 0, meanwhile

    def put(self, value) -> None:
        self.values.append(value.tolist())
        if self.meanwhile is not None and len(self.values) == 4:
            self.meanwhile()

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def taken(monkeypatch):
    """Counts the calls that the loop answers."""
    calls, original = [], _Loop.__call__
    monkeypatch.setattr(_Loop, "__call__", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def load(folder, **settings):
    options = {"method": "coreinfer", "dtype": "float32"} | settings
    loaded = load_model(folder, PartInferConfig(start_num=1, end_num=4, device="cpu", kernels="native", **options))
    loaded.model.generation_config.eos_token_id = None
    return loaded


def run(loaded, streamer=None, cache=None, prompt=PROMPT, criteria=(), **choices) -> torch.Tensor:
    torch.manual_seed(3)
    config = GenerationConfig(**{"max_new_tokens": 12, "pad_token_id": 0} | choices)
    streamer = streamer or Puts()
    return generate_ids(loaded, prompt, config, streamer, cache, stopping_criteria=StoppingCriteriaList(criteria))


def both(monkeypatch, taken, loaded, **arguments):
    """The loop's answer and transformers' own, each with what the streamer got."""
    answers = []
    for ours in (True, False):
        with monkeypatch.context() as patch:
            if not ours:
                patch.setattr(generating, "one_sequence_loop", lambda *_: None)
            streamer, before = Puts(), len(taken)
            ids = run(loaded, streamer, **arguments)
            assert (len(taken) > before) == ours
            answers.append((ids.tolist(), streamer.values, streamer.ended))
    return answers


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
@pytest.mark.parametrize("choices", CHOICES)
def test_tokens_are_those_of_transformers_loop(tiny_checkpoints, monkeypatch, taken, family, choices):
    loaded, options = load(tiny_checkpoints[family]), dict(CHOICES[choices])
    if choices == "an end token":
        options["eos_token_id"] = [1, int(run(loaded)[0, PROMPT.shape[1] + 4])]
    ours, theirs = both(monkeypatch, taken, loaded, **options)
    assert ours == theirs
    if choices == "an end token":
        assert len(ours[0][0]) <= PROMPT.shape[1] + 5
    elif choices != "at least so many":
        assert len(ours[0][0]) == PROMPT.shape[1] + 12


@pytest.mark.parametrize("settings", [{"method": "dense"}, {"dtype": "bfloat16"}, {"dtype": "int8"}])
def test_settings_of_the_model(tiny_checkpoints, monkeypatch, taken, settings):
    ours, theirs = both(monkeypatch, taken, load(tiny_checkpoints["llama"], **settings))
    assert ours == theirs


def test_other_criteria_and_a_cache_that_holds_a_part(tiny_checkpoints, monkeypatch, taken):
    loaded, tokenizer = load(tiny_checkpoints["llama"]), tiny_tokenizer()
    stop = tokenizer.decode(run(loaded)[0, PROMPT.shape[1] + 4])
    criteria = [StopStringCriteria(tokenizer, [stop])]
    ours, theirs = both(monkeypatch, taken, loaded, criteria=criteria)
    assert ours == theirs
    assert len(ours[0][0]) < PROMPT.shape[1] + 12
    answers = []
    for loop in (True, False):
        with monkeypatch.context() as patch:
            if not loop:
                patch.setattr(generating, "one_sequence_loop", lambda *_: None)
            cache = new_cache(loaded.model)
            first = run(loaded, cache=cache)
            longer = torch.cat([first[:, :-1], PROMPT], dim=1)
            answers.append(run(loaded, cache=cache, prompt=longer).tolist())
    assert answers[0] == answers[1]


def test_calls_it_is_not_made_for_take_transformers_loop(tiny_checkpoints, taken):
    loaded = load(tiny_checkpoints["llama"], method="dense")
    run(loaded, prompt=PROMPT.expand(2, -1), streamer=Puts())
    generate_ids(loaded, PROMPT, GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=0), None)
    generate_ids(
        loaded, PROMPT, GenerationConfig(max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0), Puts()
    )
    seen = []
    handle = loaded.model.register_forward_pre_hook(lambda *_: seen.append(1))
    run(loaded)
    handle.remove()
    assert not taken
    assert len(seen) == 12
    run(loaded)
    assert taken


def test_a_hook_that_comes_while_tokens_are_generated_sees_those_that_follow(tiny_checkpoints, monkeypatch, taken):
    loaded, seen, native = load(tiny_checkpoints["llama"], method="dense"), [], []
    logits = OneTokenPass.logits
    monkeypatch.setattr(OneTokenPass, "logits", lambda *a: native.append(1) or logits(*a))
    expected = run(loaded)
    native.clear()
    mlp, handles = loaded.model.model.layers[2].mlp, []
    watch = Puts(lambda: handles.append(mlp.register_forward_hook(lambda *_: seen.append(1))))
    assert torch.equal(run(loaded, watch), expected)
    handles[0].remove()
    assert taken
    assert (len(native), len(seen)) == (2, 9), "12 tokens: one from the prompt, 2 natively, 9 watched"
