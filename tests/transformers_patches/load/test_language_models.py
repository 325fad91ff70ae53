"""Checkpoints of models that also see or hear: the language model is loaded, as transformers has it by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model_table import tiny_model
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.weights.model_files import read_config

IDS = torch.arange(3, 12)[None]
KINDS = {  # text model_type: model_type, and the prefixes of its language model
    "qwen3_5_text": ("qwen3_5", "model.language_model."),
    "gemma4_text": ("gemma4", "model.language_model."),
    "gemma3_text": ("gemma3", "language_model.model."),
}


def make(folder: Path, text_type: str):
    """The checkpoint of a model with other parts beside; its language model, as transformers has it."""
    model = tiny_model(text_type)
    model.save_pretrained(folder)
    model_type, prefix = KINDS[text_type]
    weights = load_file(folder / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
    renamed |= {name: w for name, w in weights.items() if not name.startswith("model.")}
    renamed |= {"model.visual.patch_embed.weight": torch.ones(3, 3), "mtp.fc.weight": torch.ones(3, 3)}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": model_type, "text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("text_type", KINDS)
def test_the_language_model_is_loaded(tmp_path, text_type):
    model = make(tmp_path, text_type)
    loaded = load_model(tmp_path, PartInferConfig(method="dense", device="cpu"))
    assert loaded.model.config.model_type == text_type
    with torch.inference_mode():
        assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)


def test_the_whole_model_may_say_whether_embeddings_are_tied(tmp_path):
    make(tmp_path, "qwen3_5_text")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["text_config"]["tie_word_embeddings"]
    for tied in (True, False):
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        assert read_config(tmp_path).tie_word_embeddings is tied


def test_values_of_the_language_model_are_checked(tmp_path):
    make(tmp_path, "qwen3_5_text")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = "many"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PartInferError, match='text_config is .*but its vocab_size is "many", expected a whole number'):
        read_config(tmp_path)
