"""Settings of a GGUF file: the logits of what they stand for in transformers, or an error that names the key."""

from __future__ import annotations

import argparse

import pytest
import torch

from tests.tiny_gguf import tiny_llama, tiny_model, write_tiny_gguf
from tests.transformers_patches.weights.gguf_cases import CONFIGS, FACTORS, Case
from transformers_patches import flags
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model, read_config
from transformers_patches.weights.model_files import load_tokenizer

IDS = torch.randint(3, 250, (1, 100), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ignored(monkeypatch):
    """The keys that are ignored, of this test alone."""
    keys = set()
    monkeypatch.setattr("transformers_patches.weights.gguf_schema.IGNORED_GGUF_KEYS", keys)
    return keys


@torch.no_grad()
@pytest.mark.parametrize("case", CONFIGS, ids=lambda case: case.name)
def test_logits(case: Case, tmp_path):
    case.write(tmp_path / "tiny.gguf")
    settings = PartInferConfig(method="dense", dtype="float32", device="cpu", kernels="torch")
    ours = load_model(tmp_path / "tiny.gguf", settings).model(IDS).logits
    expected = case.reference()(IDS).logits
    assert (ours - expected).abs().max() < 1e-3 * expected.std()
    if case.meant:
        without = tiny_model(case.architecture, **case.fields)(IDS).logits
        bias_or_window = case.name in ("gemma2 without settings",)  # 4096 is more than the text has
        assert bias_or_window or (without - expected).abs().max() > 0.05 * expected.std()


def test_llama_3s_factors_are_its_scaling(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=131072)
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    write_tiny_gguf(tmp_path / "tiny.gguf", model=model, rope_factors=plain / model.model.rotary_emb.inv_freq)
    assert read_config(tmp_path / "tiny.gguf").rope_parameters == rope


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("llama", "llama.attention.scale", 0.5),
        ("llama", "llama.attention.sliding_window", 16),
        ("llama", "llama.logit_scale", 2.0),
        ("llama", "llama.rope.dimension_sections", [1, 2]),
        ("llama", "llama.rope.scaling.yarn_log_multiplier", 0.5),
        ("llama", "other.rope.freq_base", 1.0),
        ("llama", "tokenizer.ggml.something_new", True),
        ("llama", "tokenizer.ggml.suppress_tokens", [5]),
        ("gemma3", "gemma3.rope.global.freq_base", 5.0),
        ("gemma2", "gemma2.rope.freq_base_swa", 5.0),
        ("qwen3", "qwen3.rope.dimension_count", 8),
        ("qwen3", "qwen3.rope.scaling.yarn_beta_fast", 16.0),
        ("qwen3", "qwen3.rope.scaling.yarn_attn_factor", 1.5),
    ],
)
def test_what_is_not_understood_is_named(architecture, key, value, tmp_path, ignored):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, model=tiny_model(architecture), metadata={key: value})
    with pytest.raises(PartInferError, match=rf"tiny.gguf sets {key}.*--ignore_gguf_key {key} goes on"):
        read_config(path)
    ignored.add(key)
    write_tiny_gguf(tmp_path / "plain.gguf", model=tiny_model(architecture))
    assert read_config(path).to_dict() == read_config(tmp_path / "plain.gguf").to_dict()


def test_the_flag_adds_keys(ignored, monkeypatch):
    monkeypatch.setattr(flags, "IGNORED_GGUF_KEYS", ignored)
    parser = argparse.ArgumentParser()
    flags.add_model(parser)
    parser.parse_args(["--ignore_gguf_key", "a.b", "--ignore_gguf_key", "c"])
    assert ignored == {"a.b", "c"}


@pytest.mark.parametrize(
    "metadata",
    [
        {"general.name": "x", "quantize.imatrix.file": "y", "general.license": "z"},
        {"llama.rope.scaling.finetuned": True, "llama.rope.dimension_count": 16, "llama.expert_count": 0},
        {"llama.rope.scaling.yarn_beta_fast": 32.0, "llama.rope.scaling.yarn_ext_factor": 1.0},
        {"tokenizer.ggml.seperator_token_id": 1, "tokenizer.ggml.remove_extra_whitespaces": True},
    ],
)
def test_what_changes_nothing_is_read_over(metadata, tmp_path):
    write_tiny_gguf(tmp_path / "more.gguf", metadata=metadata)
    write_tiny_gguf(tmp_path / "plain.gguf")
    configs = [read_config(tmp_path / name).to_dict() for name in ("more.gguf", "plain.gguf")]
    assert configs[0] == configs[1]
    load_tokenizer(tmp_path / "more.gguf")


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"llama.block_count": 10**9}, {}, "tensors of 2 layers, but block_count 1000000000"),
        ({"llama.block_count": 0}, {}, "block_count must be an integer from 1"),
        ({"llama.block_count": "two"}, {}, "block_count must be an integer .*, got 'two'"),
        ({"llama.block_count": None}, {}, "has no llama.block_count"),
        ({"llama.embedding_length": 2**30}, {}, r"token_embd.weight is \[260, 64\]"),
        ({"llama.feed_forward_length": 2**30}, {}, r"ffn_up.weight is \[96, 64\]"),
        ({"llama.attention.head_count": 3}, {}, "3 heads of 16 dimensions, 2 of keys"),
        ({"llama.attention.head_count_kv": [2, 1]}, {}, "head_count_kv must be an integer .* the same for all layers"),
        ({"llama.attention.value_length": 8}, {}, "values of another length than keys"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}, "layer_norm_rms_epsilon must be a number"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "has no llama.attention.layer_norm_rms_epsilon"),
        ({"llama.attention.causal": False}, {}, "attention is not causal"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, {}, "says 2 of 8 experts .* routers"),
        ({"llama.expert_used_count": 2}, {}, "mixture of experts"),
        (
            {"llama.rope.scaling.type": "su"},
            {},
            "rope.scaling.type must be one of none, linear, yarn, longrope, got 'su'",
        ),
        ({"llama.rope.scaling.type": "longrope"}, {}, "longrope but no rope_factors_long.weight"),
        (
            {"llama.rope.scaling.type": "yarn"},
            {"rope_freqs.weight": FACTORS},
            "has rope_freqs.weight|both YaRN and rope_freqs",
        ),
        ({}, {"rope_freqs.weight": FACTORS[:3]}, "must hold 8 positive numbers"),
        ({}, {"rope_freqs.weight": -FACTORS}, "must hold 8 positive numbers"),
        ({"general.type": "adapter"}, {}, "holds no model: its general.type is 'adapter'"),
        ({}, {"token_embd.weight": None}, "has no token_embd.weight"),
        ({}, {"blk.1.ffn_up.weight": torch.zeros(3, 64)}, None),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]},
            {},
            "2 tokens, but embeddings of 260",
        ),
    ],
)
def test_contradictions_are_told(metadata, tensors, message, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, model=tiny_llama(), metadata=metadata, tensors=tensors)
    with pytest.raises(PartInferError, match=message) as raised:
        load_model(path, PartInferConfig(method="dense", device="cpu", kernels="torch"))
    assert "tiny.gguf" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_gemma_3_has_linear_scaling_alone(kind, tmp_path):
    metadata = {"gemma3.rope.scaling.type": kind, "gemma3.rope.scaling.factor": 4.0}
    write_tiny_gguf(tmp_path / "tiny.gguf", model=tiny_model("gemma3"), metadata=metadata)
    if kind == "yarn":
        with pytest.raises(PartInferError, match="yarn scaling of gemma3 can't be computed, linear can"):
            read_config(tmp_path / "tiny.gguf")
    else:
        assert read_config(tmp_path / "tiny.gguf").rope_parameters["full_attention"]["factor"] == 4.0
