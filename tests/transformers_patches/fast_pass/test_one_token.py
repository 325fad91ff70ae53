"""The native pass over one token against transformers' own, and the cache that grows."""

import weakref
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.conftest import FAMILIES
from tests.transformers_patches.made_up_files import with_statistics
from tests.transformers_patches.model_passes import DATASET, MODEL
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.families import family_of
from transformers_patches.fast_pass.kv_cache import GrowingCache, GrowingLayer
from transformers_patches.fast_pass.one_token import OneTokenPass, new_cache, one_token_pass
from transformers_patches.fast_pass.positions import RotaryTable
from transformers_patches.load.loader import load_model
from transformers_patches.sparse.sparse_ffn import SparseFFN

PROMPT = torch.arange(3, 23)[None]
pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.why_not()}")


def load(folder, method: str, **settings):
    config = PartInferConfig(method=method, start_num=1, end_num=4, device="cpu", kernels="native", **settings)
    return load_model(folder, config, DATASET, MODEL)


def decode(model, cache, steps: int = 6) -> torch.Tensor:
    """Logits [steps, V] of given tokens, one at a time, after the prompt."""
    logits = []
    with torch.inference_mode():
        model(PROMPT, past_key_values=cache, use_cache=True)
        for token in range(40, 40 + steps):
            ids = torch.tensor([[token]])
            logits.append(model(ids, past_key_values=cache, use_cache=True).logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tiny_checkpoints, family):
    loaded = load(tiny_checkpoints[family], "dense", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoints[family], dtype=torch.float32)
    cache = new_cache(loaded.model)
    ours = decode(loaded.model, cache)
    torch.testing.assert_close(ours, decode(plain, DynamicCache()), rtol=1e-4, atol=1e-4)
    native = family_of(plain.config).native_decoder
    assert native == (type(cache.layers[0]) is GrowingLayer)
    assert native == (one_token_pass(loaded.model) is not None)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("dtype, close", [("float32", 1e-4), ("bfloat16", 0.1), ("int8", 0.1)])
def test_sparse_layers_stay_what_they_are(tiny_checkpoints, family, dtype, close):
    loaded = load(tiny_checkpoints[family], "partinfer", dtype=dtype)
    loaded.reset_counters()
    natively = decode(loaded.model, new_cache(loaded.model))
    assert loaded.computed_fraction() == pytest.approx(0.4)
    ordinary = decode(loaded.model, DynamicCache())  # a cache without room: transformers' own pass
    scale = ordinary.float().std()
    assert (natively - ordinary).float().pow(2).mean().sqrt() < close * scale


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dense"},
        {"method": "partinfer", "selection": "core"},
        {"method": "partinfer", "selection": "core", "compensation": "mean"},
        {"method": "partinfer", "selection": "up"},
        {"method": "partinfer", "selection": "up", "token_count": "average"},
        {"method": "partinfer", "selection": "up", "loaded_neurons_percent": 0.9},
        {"method": "coreinfer", "use_partial_loading": False},
    ],
    ids=lambda options: " ".join(str(value) for value in options.values()),
)
@pytest.mark.parametrize("family", ["qwen2", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
def test_layers_in_one_call_are_layers_one_by_one(tiny_checkpoints, monkeypatch, options, dtype, family):
    ranking = with_statistics(3)
    config = PartInferConfig(**options, dtype=dtype, start_num=1, end_num=4, device="cpu", kernels="native")
    loaded = load_model(tiny_checkpoints[family], config, ranking, MODEL)
    forward = one_token_pass(loaded.model)
    results = {}
    for together in (True, False):
        with monkeypatch.context() as patch:
            if not together:
                patch.setattr(SparseFFN, "active_neurons", lambda *_: None)
                patch.setattr(OneTokenPass, "_follow_choices", _nothing_native)
            loaded.reset_counters()
            logits = [decode(loaded.model, new_cache(loaded.model)) for _ in range(2)]  # two requests
            assert torch.equal(*logits)
            counts = [(f.counters.tokens, f.counters.neurons, f.counters.rows) for f in loaded.state.layers]
            results[together] = logits[0], counts, forward.runs
    assert torch.equal(results[True][0], results[False][0])
    assert results[True][1] == results[False][1]
    alone = [range(n, n + 1) for n in range(6)]
    if dtype == "int4":  # whole layers hold a down projection in bfloat16 here: its columns are no groups of 32
        assert results[True][2] == (alone if options["method"] == "dense" else [range(1), range(1, 5), range(5, 6)])
    else:
        assert results[True][2] == [range(6)]
    assert results[False][2] == alone


def _nothing_native(forward: OneTokenPass, _) -> None:
    for layer in forward.layers:
        layer.native = False
    forward.runs = [range(n, n + 1) for n in range(len(forward.layers))]


def test_a_prompt_of_several_passes_is_evidence_to_its_last_token(tiny_checkpoints):
    loaded = load(tiny_checkpoints["llama"], "partinfer", dtype="float32", selection="core")
    expected = decode(loaded.model, new_cache(loaded.model))
    cache, logits = new_cache(loaded.model), []
    with torch.inference_mode():
        with loaded.state.expect_prompt(PROMPT.shape[1]):
            for part in (PROMPT[:, :-1], PROMPT[:, -1:]):  # the second pass has one token, and is no decoding
                loaded.model(part, past_key_values=cache, use_cache=True)
        for token in range(40, 46):
            output = loaded.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            logits.append(output.logits[0, -1])
    torch.testing.assert_close(torch.stack(logits), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_the_native_call_does_not_know_runs_between_others(tiny_checkpoints, monkeypatch):
    loaded = load(tiny_checkpoints["llama"], "partinfer", dtype="float32", selection="core")
    expected = decode(loaded.model, new_cache(loaded.model))
    monkeypatch.setattr(loaded.state.layers[1], "active_neurons", lambda _: None)
    ours = decode(loaded.model, new_cache(loaded.model))
    assert loaded.model.model.forward.runs == [range(2), range(2, 3), range(3, 6)]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rope", [None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}]
)
def test_kept_rotary_embeddings_are_those_of_the_module(rope):
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=300,
        rope_parameters=rope and rope | {"rope_theta": 10000.0},
    )
    rotary = LlamaRotaryEmbedding(config)
    table = RotaryTable(rotary)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 1, 32, dtype=dtype)
        for position in (0, 7, 255, 256, 290, 1000):
            expected = rotary(x, torch.tensor([[position]]))
            assert all(torch.equal(a, b) for a, b in zip(table.rope(x, position), expected, strict=True))
            assert table.embedding(position) is None
    assert bool(table.blocks) == (rope is None or rope["rope_type"] != "dynamic")


def test_the_native_pass_is_taken_and_left_for_hooks(tiny_checkpoints, monkeypatch):
    loaded = load(tiny_checkpoints["llama"], "dense", dtype="float32")
    taken = []
    native = OneTokenPass.advance
    monkeypatch.setattr(OneTokenPass, "advance", lambda *a: taken.append(1) or native(*a))
    decode(loaded.model, new_cache(loaded.model), steps=3)
    assert len(taken) == 3
    seen = []
    handle = loaded.model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append(1))
    decode(loaded.model, new_cache(loaded.model), steps=3)
    handle.remove()
    assert (len(taken), len(seen)) == (3, 4), "the prompt's pass and three more"


def test_a_sliding_window_hides_what_is_before_it(tiny_checkpoints):
    folder = tiny_checkpoints["mistral"]
    settings = {"dtype": torch.float32, "sliding_window": 8}
    plain = AutoModelForCausalLM.from_pretrained(folder, **settings)
    loaded = load(folder, "dense", dtype="float32")
    wide = decode(loaded.model, new_cache(loaded.model))
    loaded.model.model.forward.original.__self__.config.sliding_window = 8
    for layer in loaded.model.model.forward.layers:
        layer.attention = replace(layer.attention, window=8)
    loaded.model.model.forward.native = None  # is made again
    narrow = decode(loaded.model, new_cache(loaded.model))
    torch.testing.assert_close(narrow, decode(plain, DynamicCache()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wide, narrow, atol=1e-2)


def test_the_cache_grows_crops_and_keeps_its_content():
    ours, theirs = GrowingCache(), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    for tokens in (3, 1, 300, 1, 700):
        keys, values = torch.randn(2, 1, 2, tokens, 4, generator=generator)
        for cache in (ours, theirs):
            cache.update(keys, values, 0)
        assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
        assert torch.equal(ours.layers[0].values, theirs.layers[0].values)
    for cache in (ours, theirs):
        cache.crop(-500)
    keys, values = torch.randn(2, 1, 2, 5, 4, generator=generator)
    for cache in (ours, theirs):
        cache.update(keys, values, 0)
        cache.batch_repeat_interleave(2)
    assert ours.get_seq_length() == theirs.get_seq_length() == 510
    assert torch.equal(ours.layers[0].values, theirs.layers[0].values)
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
    ours.reset()
    assert ours.get_seq_length() == 0


def test_room_for_a_token_is_looked_up_once_and_old_buffers_go():
    cache = GrowingCache()
    for number in range(3):
        cache.update(*torch.zeros(2, 1, 2, 5, 4), number)
    whole, part = cache.room_for_one(range(3)), cache.room_for_one(range(1, 3))
    assert whole.capacity > 5
    assert cache.room_for_one(range(1, 3)) is part
    old = weakref.ref(cache.layers[1]._keys)
    for layer in cache.layers:
        layer.length = whole.capacity  # as if tokens had been written
    del whole, part
    grown = cache.room_for_one(range(3))
    assert grown.capacity > cache.layers[0].length
    assert grown is cache.room_for_one(range(3))
    assert all(keys is layer._keys for keys, layer in zip(grown.keys, cache.layers, strict=True))
    assert old() is None
    cache.crop(-3)
    assert cache.room_for_one(range(3)) is grown
    cache.layers[2].keys = cache.layers[2].keys.clone()
    assert cache.room_for_one(range(3)) is not grown
