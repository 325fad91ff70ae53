"""GGUF files that are written: settings, scaling of positions, vocabulary. What they mean is what the reader finds in them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.tiny_gguf import tiny_model, write_tiny_gguf
from tests.transformers_patches.weights.gguf_cases import TEXTS, byte_level_vocabulary, sentencepiece_vocabulary
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.weights.gguf_config import gguf_config
from transformers_patches.weights.gguf_tokenizer import gguf_tokenizer
from transformers_patches.weights.gguf_vocabulary_writer import vocabulary_metadata
from transformers_patches.weights.gguf_writer import write_gguf
from transformers_patches.weights.safetensors_folder import Checkpoint

THETA = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    LLAMA3 | {"factor": 8.0},
    LLAMA3 | {"factor": 32.0},
]
IDS = torch.arange(3, 60)[None]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: f"{scaling['rope_type']} {scaling.get('factor', '')}")
def test_scaling_of_positions(tmp_path, scaling):
    model = tiny_model("llama", rope_parameters=THETA | scaling)
    model.save_pretrained(tmp_path / "in")
    write_gguf(tmp_path / "out.gguf", Checkpoint(tmp_path / "in"), model.config, "float32")
    assert gguf_config(tmp_path / "out.gguf").rope_parameters == THETA | scaling
    read = load_model(tmp_path / "out.gguf", PartInferConfig(method="dense", dtype="float32", device="cpu")).model
    with torch.inference_mode():
        torch.testing.assert_close(read(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
    if importlib.util.find_spec("llama_cpp") is not None:
        from tests.llama_cpp_model import LlamaCppModel

        logits = LlamaCppModel(tmp_path / "out.gguf").logits(IDS[0].tolist())
        torch.testing.assert_close(logits, read(input_ids=IDS).logits[0].detach(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling .dynamic"),
        ({"rope_parameters": THETA | SCALINGS[2] | {"attention_factor": 2.0}}, "with attention_factor"),
        ({"hidden_act": "gelu"}, "hidden_act .gelu.: llama.cpp computes llama models with silu"),
    ],
)
def test_settings_that_a_file_can_not_say(tmp_path, fields, said):
    model = tiny_model("llama", **fields)
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(PartInferError, match=said):
        write_gguf(tmp_path / "out.gguf", Checkpoint(tmp_path / "in"), model.config, "float32")


def test_a_window_that_llama_cpp_would_not_see(tmp_path):
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=16)
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(PartInferError, match="no sliding window"):
        write_gguf(tmp_path / "out.gguf", Checkpoint(tmp_path / "in"), model.config, "float32")


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2", "deepseek-coder"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_a_byte_level_vocabulary(tmp_path, pre, add_bos):
    """The same tokens, also of texts that the pre-tokenizer was not found by; rows without a token stay empty."""
    vocabulary = byte_level_vocabulary() | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": add_bos}
    rows = len(vocabulary["tokenizer.ggml.tokens"])
    write_tiny_gguf(tmp_path / "in.gguf", model=tiny_model("llama", vocab_size=rows), metadata=vocabulary)
    original = gguf_tokenizer(tmp_path / "in.gguf")
    original.save_pretrained(tmp_path / "folder")
    found = vocabulary_metadata(tmp_path / "folder", original, rows + 5, [2, 0])
    model = tiny_model("llama", vocab_size=rows + 5)
    model.save_pretrained(tmp_path / "folder")
    write_gguf(tmp_path / "out.gguf", Checkpoint(tmp_path / "folder"), model.config, "float32", found)
    written = gguf_tokenizer(tmp_path / "out.gguf")
    texts = [*TEXTS[:1], *TEXTS[2:6], "<|im_start|>user\nHi<|im_end|>"]
    assert [written(text).input_ids for text in texts] == [original(text).input_ids for text in texts]
    assert written.chat_template == original.chat_template
    assert set(gguf_config(tmp_path / "out.gguf").eos_token_id) == {2, 0}
    if importlib.util.find_spec("llama_cpp") is not None:
        from tests.llama_cpp_model import LlamaCppModel

        judge = LlamaCppModel(tmp_path / "out.gguf")
        assert [judge.tokens(text) for text in texts] == [original(text).input_ids for text in texts]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary(tmp_path, prefix):
    """Scores from the merges of a folder's tokenizer.json give the same tokens, here and in llama.cpp."""
    vocabulary = sentencepiece_vocabulary() | {"tokenizer.ggml.add_space_prefix": prefix}
    rows = len(vocabulary["tokenizer.ggml.tokens"])
    model = tiny_model("llama", vocab_size=rows)
    write_tiny_gguf(tmp_path / "in.gguf", model=model, metadata=vocabulary)
    original = gguf_tokenizer(tmp_path / "in.gguf")
    original.save_pretrained(tmp_path / "folder")
    model.save_pretrained(tmp_path / "folder")
    found = vocabulary_metadata(tmp_path / "folder", original, rows, [2])
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    write_gguf(tmp_path / "out.gguf", Checkpoint(tmp_path / "folder"), model.config, "float32", found)
    written, texts = gguf_tokenizer(tmp_path / "out.gguf"), [*TEXTS, "<s>hi <end_of_turn> there", "a   b    c"]
    assert [written(text).input_ids for text in texts] == [original(text).input_ids for text in texts]
    if importlib.util.find_spec("llama_cpp") is not None:
        from tests.llama_cpp_model import LlamaCppModel

        judge = LlamaCppModel(tmp_path / "out.gguf")
        assert [judge.tokens(text) for text in texts] == [original(text).input_ids for text in texts]


def test_a_text_that_llama_cpp_would_change_otherwise(tmp_path):
    """A normalizer that files can't say."""
    tokens = ["<unk>", "e", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(PartInferError, match="joins tokens as llama.cpp's sentencepiece does not"):
        vocabulary_metadata(tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend), len(tokens), [])


def test_other_vocabularies_are_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(PartInferError, match="neither BPE over bytes nor.*convert_hf_to_gguf.py"):
        vocabulary_metadata(tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend), 2, [])


def test_types_and_file_say_the_same(tmp_path):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path / "in")
    for dtype in ("float16", "bfloat16"):
        write_gguf(tmp_path / f"{dtype}.gguf", Checkpoint(tmp_path / "in"), model.config, dtype)
        assert gguf_config(tmp_path / f"{dtype}.gguf").dtype == getattr(torch, dtype)


def test_an_architecture_that_is_not_known(tmp_path):
    config = LlamaConfig(model_type="llama")
    config.model_type = "opt"
    with pytest.raises(PartInferError, match="GGUF files can be written of arcee, .* models, this one is opt"):
        write_gguf(tmp_path / "it.gguf", None, config, "float32")
