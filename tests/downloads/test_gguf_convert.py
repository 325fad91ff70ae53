"""GGUF to a standard folder: the same model, its tokenizer and chat template."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from downloads.complete import missing_part
from downloads.gguf_convert import convert_gguf
from tests.tiny_gguf import CHAT_TEMPLATE, tiny_llama, write_tiny_gguf


@pytest.fixture(scope="module", params=["F32", "Q8_0"])
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    write_tiny_gguf(folder / "model.gguf", kind=request.param)
    convert_gguf(folder / "model.gguf", folder / "out")
    return request.param == "Q8_0", folder / "out"


def test_weights_are_those_of_the_original(converted):
    quantized, folder = converted
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    expected = tiny_llama().state_dict()
    got = model.state_dict()
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        if quantized and "_proj" in name:  # half a step of Q8_0 (largest of 32 values / 127), and of bfloat16
            step = weight.abs().max() / 127
            assert (got[name].float() - weight).abs().max() <= 0.5 * step + weight.abs().max() / 256
            assert not torch.equal(got[name].float(), weight)
        else:
            assert torch.equal(got[name].float(), weight), name


def test_folder_is_standard(converted):
    _, folder = converted
    assert missing_part(folder) is None
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([2, 0], 2)  # <|endoftext|> ends an answer, too


def test_tokenizer(converted):
    _, folder = converted
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "h", "i", "<|im_end|>"]
    # digits stand alone, so that the two spaces before them may merge
    assert tokenizer.tokenize("a  24") == ["a", "ĠĠ", "2", "4"]
    assert tokenizer.decode(tokenizer("Größe 24").input_ids) == "Größe 24"
