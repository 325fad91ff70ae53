"""What a GGUF file means, by llama.cpp itself: logits, tokens, and what ends an answer."""

from __future__ import annotations

import random

import pytest
import torch

from tests.llama_cpp_model import LlamaCppModel
from tests.model_gguf import FILES
from tests.model_table import VOCABULARY
from tests.tiny_gguf import tiny_model, tokens, write_tiny_gguf
from tests.transformers_patches.weights.gguf_cases import (
    CONFIGS,
    TEXTS,
    Case,
    byte_level_vocabulary,
    sentencepiece_vocabulary,
)
from tests.transformers_patches.weights.test_gguf_models import CASES as MODEL_CASES
from tests.transformers_patches.weights.test_gguf_models import write_case
from tests.transformers_patches.weights.test_gguf_ties import letters, merged, spaces, written
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model, read_config
from transformers_patches.weights.gguf_pre_tokenizers import PRE_TOKENIZERS
from transformers_patches.weights.model_files import load_tokenizer

IDS = torch.randint(3, 250, (1, 100), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("case", CONFIGS, ids=lambda case: case.name)
def test_logits(case: Case, tmp_path):
    path = tmp_path / "tiny.gguf"
    case.write(path)
    expected = LlamaCppModel(path).logits(IDS[0].tolist())
    settings = PartInferConfig(method="dense", dtype="float32", device="cpu", kernels="torch")
    ours = load_model(path, settings).model(IDS).logits[0]
    # llama.cpp's GELU comes from a table of 16 bits
    bound = 0.1 if case.architecture.startswith("gemma") else 1e-3
    assert (ours - expected).abs().max() / expected.std() < bound


# What llama.cpp computes of some architectures: no biases in FFNs, windows of the 32B model only, …
AS_LLAMA_CPP_HAS_IT = {
    "exaone4": {"num_hidden_layers": 64, "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16},
    "ernie4_5": {"use_bias": False},
    "phi3": {"sliding_window": None},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},  # llama.cpp rounds YaRN's bounds
}
NOT_THERE = ("seed_oss, biases", "smollm3, biases")


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in (*FILES, *MODEL_CASES) if name not in NOT_THERE])
def test_logits_of_other_architectures(name, tmp_path):
    path, ids = tmp_path / "tiny.gguf", IDS.remainder(VOCABULARY)
    model = write_case(path, name, AS_LLAMA_CPP_HAS_IT.get(name))
    expected = LlamaCppModel(path).logits(ids[0].tolist())
    settings = PartInferConfig(method="dense", dtype="float32", device="cpu", kernels="torch")
    ours = load_model(path, settings).model(ids).logits[0]
    # llama.cpp's GELU comes from a table of 16 bits
    bound = 0.1 if model.config.model_type in ("gemma", "starcoder2", "gpt_neox") else 1e-3
    assert (ours - expected).abs().max() / expected.std() < bound


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_byte_level_tokens(pre, tmp_path):
    path = tmp_path / "tiny.gguf"
    metadata = byte_level_vocabulary() | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": None}
    model = tiny_model("llama", vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    write_tiny_gguf(path, model=model, metadata=metadata)
    judge, tokenizer = LlamaCppModel(path), load_tokenizer(path)
    for text in TEXTS:
        assert tokenizer(text).input_ids == judge.tokens(text), text
    assert set(read_config(path).eos_token_id) == judge.ends()


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tokenizer.ggml.add_space_prefix": False},
        {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True},
        {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.eos_token_id": None},
        {"tokenizer.ggml.padding_token_id": 2**32 - 1},
    ],
    ids=lambda metadata: "+".join(key.removeprefix("tokenizer.ggml.") for key in metadata) or "defaults",
)
def test_sentencepiece_tokens(metadata, tmp_path):
    path = tmp_path / "tiny.gguf"
    metadata = sentencepiece_vocabulary() | metadata
    model = tiny_model("llama", vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    write_tiny_gguf(path, model=model, metadata=metadata)
    judge, tokenizer = LlamaCppModel(path), load_tokenizer(path)
    for text in (*TEXTS, "  two", "<s>hi <end_of_turn> there<end_of_turn>x", "", "   ", "a   b    c"):
        assert tokenizer(text).input_ids == judge.tokens(text), text
    assert set(read_config(path).eos_token_id) == judge.ends()


def test_equal_scores(tmp_path):
    """The scores of Llama's own runs of spaces; and the judge of the other tests of equal scores is right."""
    scores = {"ab": -1, "▁a": -2, "▁ab": -3, "ba": -4, "bc": -4, "abc": -9} | spaces(16) | letters("▁abc")
    path = written(tmp_path / "tiny.gguf", scores)
    judge, tokenizer = LlamaCppModel(path), load_tokenizer(path)
    source = random.Random(0)
    for length in (*range(1, 40), *[30] * 60):
        for text in (" " * length, "".join(source.choices("  abc", k=length))):
            found = tokenizer(text).input_ids
            assert found == judge.tokens(text), text
            assert tokenizer.convert_ids_to_tokens(found) == merged(text.replace(" ", "▁"), scores)


@pytest.mark.parametrize("text", ["<|eot_id|>", "<end_of_turn>", "<|fim_pad|>", "<|file_sep|>", "<|eom_id|>", "plain"])
def test_ends_of_an_answer(text, tmp_path):
    path = tmp_path / "tiny.gguf"
    listed = [*tokens()[:-1], text]
    metadata = {"tokenizer.ggml.tokens": listed, "tokenizer.ggml.merges": ["Ġ t"], "tokenizer.ggml.eot_token_id": 1}
    listed[-2] = "Ġt"
    write_tiny_gguf(path, metadata=metadata)
    assert set(read_config(path).eos_token_id) == LlamaCppModel(path).ends()
