"""GGUF files of every architecture that can be written: logits are those of the model, here and in llama.cpp."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.model_table import LAYERS, VARIANTS, tiny_model
from tests.transformers_patches.weights.test_gguf_models import AS_FILES_HAVE_IT, OLMO3_ROPE
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import FAMILIES
from transformers_patches.load.loader import load_model
from transformers_patches.weights.gguf_architectures import WRITTEN
from transformers_patches.weights.gguf_writer import write_gguf
from transformers_patches.weights.safetensors_folder import Checkpoint

IDS = torch.arange(3, 103)[None]
MODEL_TYPES = [*(name for name, family in FAMILIES.items() if family.gguf), *WRITTEN]

NO_WINDOW = {"sliding_window": None}
GRANTED = AS_FILES_HAVE_IT | {  # what llama.cpp takes for granted
    **dict.fromkeys(("gemma2", "gemma3_text"), {"query_pre_attn_scalar": 8}),
    "phi3": NO_WINDOW,
    "exaone4": NO_WINDOW | {"layer_types": ["full_attention"] * LAYERS},
    "ernie4_5": {"use_bias": False},
    "gpt_neox": {"num_key_value_heads": 4},
}
CASES = {
    "granite, biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "nemotron, biases": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "glm4, biases": ("glm4", {"attention_bias": True}),
    "seed_oss, no biases": ("seed_oss", {"attention_bias": False}),
    "gpt_neox, one after the other": VARIANTS["gpt_neox, one after the other"],
    "olmo3, YaRN": ("olmo3", {"rope_parameters": OLMO3_ROPE}),
}


def written(tmp_path, model_type, options):
    model = tiny_model(model_type, GRANTED.get(model_type, {}) | options)
    model.save_pretrained(tmp_path / "in")
    write_gguf(tmp_path / "out.gguf", Checkpoint(tmp_path / "in"), model.config, "float32")
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", [*MODEL_TYPES, *CASES])
def test_logits(name, tmp_path):
    model = written(tmp_path, *CASES.get(name, (name, {})))
    settings = PartInferConfig(method="dense", device="cpu", kernels="torch", dtype="float32")
    ours = load_model(tmp_path / "out.gguf", settings).model
    expected = model(IDS).logits
    assert (ours(IDS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    if importlib.util.find_spec("llama_cpp") is not None:
        from tests.llama_cpp_model import LlamaCppModel

        found = LlamaCppModel(tmp_path / "out.gguf").logits(IDS[0].tolist())
        assert (found - expected[0]).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("model_type", "options", "said"),
    [
        ("phi3", {"sliding_window": 6}, "no sliding window for phi3 models, this one has one of 6 tokens"),
        ("exaone4", {"sliding_window": 6, "layer_types": ["sliding_attention"] * LAYERS}, "no sliding window"),
        ("smollm3", {"mlp_bias": True}, r"no place for the biases of smollm3 models \(mlp_bias"),
        ("qwen3", {"attention_bias": True}, r"no place for the biases of qwen3 models \(attention_bias"),
        ("starcoder2", {"use_bias": False}, "computes starcoder2 models with biases"),
        ("gpt_neox", {"attention_bias": False}, r"with biases, this one has none \(attention_bias"),
        ("gemma2", {"query_pre_attn_scalar": 16}, r"can't say the model's query_pre_attn_scalar \(16\).*with 8"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "can't say the model's no_rope_layers"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaling .dynamic"),
        ("apertus", {}, "GGUF files can be written of .*, this one is apertus"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, model_type, options, said):
    with pytest.raises(PartInferError, match=said):
        written(tmp_path, model_type, options)
