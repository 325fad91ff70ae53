"""llama.cpp's types: their names in flags, the files, and the loss of a file on the same examples."""

from __future__ import annotations

import importlib.util

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evaluation.compared import files
from evaluation.compared.files import ComparedFiles, own_file, own_kind
from evaluation.compared.kinds import QUANTIZED, parse_compared
from evaluation.windows import Example
from tests.conftest import LAYERS
from tests.tiny_gguf import tiny_model, write_tiny_gguf
from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf_writer import write_gguf
from transformers_patches.weights.safetensors_folder import Checkpoint

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


@pytest.mark.parametrize(
    "text, kinds",
    [
        ("", []),
        ("llama.cpp", [None]),
        ("llama.cpp,llama.cpp:q8_0", [None, "q8_0"]),
        ("llama.cpp:q4_k_m, iq4_xs,q4_0,q3_k_m,iq3_s,q2_k", ["q4_k_m", "iq4_xs", "q4_0", "q3_k_m", "iq3_s", "q2_k"]),
        ("llama.cpp:q4_0,llama.cpp:q4_0,llama.cpp,q2_k", ["q4_0", None, "q2_k"]),
    ],
)
def test_lists_of_types(text, kinds):
    assert parse_compared(text) == kinds


@pytest.mark.parametrize("text", ["q4_0", "vllm", "llama.cpp:q9", "llama.cpp:q4_0,q9", "vllm:q4_0"])
def test_unknown_types_are_named(text):
    with pytest.raises(PartInferError, match="--compare takes llama.cpp"):
        parse_compared(text)


def test_a_gguf_file_holds_the_same_weights(model_folder, tmp_path):
    weights, config = Checkpoint(model_folder), AutoConfig.from_pretrained(model_folder)
    write_gguf(tmp_path / "it.gguf", weights, config, "float32")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "it.gguf").tensors}
    assert len(tensors) == len(weights.names()) == 2 + 1 + 9 * LAYERS
    stored = torch.empty(weights.shape("model.layers.0.mlp.up_proj.weight"))
    weights.read_into("model.layers.0.mlp.up_proj.weight", stored)
    assert torch.equal(torch.from_numpy(tensors["blk.0.ffn_up.weight"].data.copy()), stored)


def test_llama_cpp_does_not_know_every_family(tiny_checkpoints, tmp_path):
    folder = tiny_checkpoints["opt"]
    with pytest.raises(PartInferError, match="this one is opt"):
        write_gguf(tmp_path / "it.gguf", Checkpoint(folder), AutoConfig.from_pretrained(folder), "float32")


def test_which_type_stands_for_a_dtype(model_folder):
    config = AutoConfig.from_pretrained(model_folder)
    kinds = [own_kind(config, given) for given in (None, "auto", "int8", "int4", "float16")]
    assert kinds == ["float32", "float32", "q8_0", "q4_0", "float16"]


def test_the_file_that_a_checkpoint_came_from(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    assert own_file(folder) is None
    write_tiny_gguf(tmp_path / "tiny.gguf")
    assert own_file(folder) == own_file(tmp_path / "tiny.gguf") == tmp_path / "tiny.gguf"


def made(folder, scratch) -> ComparedFiles:
    config = AutoConfig.from_pretrained(folder)
    return ComparedFiles(folder, lambda: Checkpoint(folder), config, "float32", scratch)


def test_its_own_file_stands_for_its_type(tmp_path, monkeypatch):
    """...and is the base of the others."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    bases = []

    def quantize(base, path, kind) -> None:
        bases.append((base.name, kind))
        write_tiny_gguf(path, "Q4_0")

    monkeypatch.setattr(files, "quantize", quantize)
    folder = tmp_path / "tiny"
    model = tiny_model("llama")
    model.save_pretrained(folder)
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q8_0", metadata={"general.file_type": QUANTIZED["q8_0"]})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = made(folder, scratch)
    own, other = found.file("q8_0"), found.file("q4_0")
    assert (own.path, own.note, own.label) == (tmp_path / "tiny.gguf", "tiny.gguf itself", "llama.cpp q8_0")
    assert found.file("q4_0") is other
    assert bases == [("tiny.gguf", "q4_0")]
    assert "no importance matrix" in other.note
    tensors = gguf.GGUFReader(own.path).tensors
    assert own.token_bytes == sum(tensor.n_bytes for tensor in tensors)  # the embedding is the lm_head, too


def test_without_its_own_file_the_weights_are_written_first(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(files, "quantize", lambda base, path, kind: path.write_bytes(base.read_bytes()))
    found = made(model_folder, tmp_path).file("q2_k")
    assert (tmp_path / "float32.gguf").is_file()
    tensors = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(found.path).tensors}
    assert found.token_bytes == sum(tensors.values()) - tensors["token_embd.weight"]


@needs_llama_cpp
@pytest.mark.parametrize("token_by_token", [False, True])
@pytest.mark.parametrize("context", [5, 1])
def test_llama_cpp_gives_the_models_logits(tiny_checkpoints, tmp_path, context, token_by_token):
    from evaluation.compared.scoring import LlamaCppModel

    folder = tiny_checkpoints["qwen2"]
    example = Example(list(range(3, 3 + context)), [20, 21, 22, 23])
    model = LlamaCppModel(made(folder, tmp_path).file("float32").path, context=16, threads=1)
    logits = model.logits(example, token_by_token=token_by_token)
    model.close()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = plain(torch.tensor([example.context + example.target])).logits[0, context - 1 : -1]
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.01)  # its cache is in float16


@needs_llama_cpp
def test_every_type_can_be_written(tmp_path):
    from evaluation.compared.scoring import LlamaCppModel

    model = tiny_model("llama", hidden_size=256, intermediate_size=512, head_dim=64)
    model.save_pretrained(tmp_path / "tiny")
    found = made(tmp_path / "tiny", tmp_path)
    sizes = {}
    for kind in QUANTIZED:
        file = found.file(kind)
        loaded = LlamaCppModel(file.path, context=16, threads=1)
        sizes[kind] = loaded.resident_bytes
        assert loaded.logits(Example([1, 5], [6]), token_by_token=False).isfinite().all()
        loaded.close()
    assert sizes["q8_0"] > sizes["q6_k"] > sizes["q4_k_m"] > sizes["q3_k_m"] > sizes["q2_k"]
