"""The native pass over one token against transformers' own, and the cache that grows."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from tests.conftest import FAMILIES
from tests.transformers_patches.model_passes import DATASET, MODEL
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.kv_cache import GrowingLayer, growing_cache
from transformers_patches.loading import load_model
from transformers_patches.one_token import FAMILIES as NATIVE
from transformers_patches.one_token import OneTokenPass, new_cache

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
    native = plain.config.model_type in NATIVE
    assert native == (type(cache.layers[0]) is GrowingLayer)
    assert native == isinstance(getattr(loaded.model.model, "forward", None), OneTokenPass)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype, close", [("float32", 1e-4), ("bfloat16", 0.1), ("int8", 0.1)])
def test_sparse_layers_stay_what_they_are(tiny_checkpoints, family, dtype, close):
    loaded = load(tiny_checkpoints[family], "partinfer", dtype=dtype)
    loaded.reset_counters()
    natively = decode(loaded.model, new_cache(loaded.model))
    assert loaded.computed_fraction() == pytest.approx(0.4)
    ordinary = decode(loaded.model, DynamicCache())  # a cache without room: transformers' own pass
    scale = ordinary.float().std()
    assert (natively - ordinary).float().pow(2).mean().sqrt() < close * scale


def test_the_native_pass_is_taken_and_left_for_hooks(tiny_checkpoints, monkeypatch):
    loaded = load(tiny_checkpoints["llama"], "dense", dtype="float32")
    taken = []
    native = OneTokenPass._pass
    monkeypatch.setattr(OneTokenPass, "_pass", lambda *a: taken.append(1) or native(*a))
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
    narrow = decode(loaded.model, new_cache(loaded.model))
    torch.testing.assert_close(narrow, decode(plain, DynamicCache()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wide, narrow, atol=1e-2)


def test_the_cache_grows_crops_and_keeps_its_content():
    ours, theirs = growing_cache(), DynamicCache()
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
