"""Damaged and hostile checkpoint folders: each is read and computes, or is refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.fuzz.mutations import READ, REFUSED, VALUES, changed_bytes, changed_json, outcome
from tests.tiny_tokenizer import tiny_tokenizer
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model
from transformers_patches.weights.model_files import load_tokenizer

FAMILIES = ("llama", "smollm2", "qwen2", "gemma3", "opt", "mistral")
KEYS = [  # that the tiny configs need not have
    *(
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
        "rope_scaling",
        "rope_theta",
        "head_dim",
        "sliding_window",
        "layer_types",
    ),
    *("use_sliding_window", "max_window_layers", "quantization_config", "auto_map", "return_dict", "pretraining_tp"),
    *("attention_bias", "query_pre_attn_scalar", "final_logit_softcapping", "hidden_activation", "is_encoder_decoder"),
    *(
        "do_layer_norm_before",
        "word_embed_proj_dim",
        "_attn_implementation",
        "text_config",
        "num_labels",
        "problem_type",
    ),
]


@torch.no_grad()
def use_folder(folder: Path) -> None:
    settings = PartInferConfig(method="dense", device="cpu", kernels="torch")
    model = load_model(folder, settings).model
    model(torch.tensor([[1, 3, 4]]) % model.config.vocab_size)


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer("Two 22  words\n").input_ids)


def change_config(folder: Path, source: random.Random) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    if source.random() < 0.4:
        content[source.choice(KEYS)] = source.choice(VALUES)
        path.write_text(json.dumps(content))
    elif source.random() < 0.2:
        data = path.read_bytes()
        path.write_bytes(changed_bytes(data, len(data), source))
    else:
        path.write_text(changed_json(content, source))


def change_weights(folder: Path, source: random.Random) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(changed_bytes(data, 8 + int.from_bytes(data[:8], "little"), source))


def change_index(folder: Path, source: random.Random) -> None:
    path = folder / "model.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    names = [name for name in json.loads(path.read_bytes()[8 : 8 + size]) if name != "__metadata__"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    os.replace(path, folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(changed_json(index, source))


def change_tokenizer(folder: Path, source: random.Random) -> None:
    path = folder / source.choice(("tokenizer.json", "tokenizer_config.json"))
    content = json.loads(path.read_text())
    if source.random() < 0.3:
        data = path.read_bytes()
        path.write_bytes(changed_bytes(data, len(data), source))
    else:
        path.write_text(changed_json(content, source))


def campaign(root: Path, originals: dict[str, Path], seed: int, count: int) -> Counter:
    source = random.Random(f"folders {seed}")
    seen = Counter()
    for number in range(count):
        folder = root / str(number)
        shutil.copytree(originals[source.choice(FAMILIES)], folder)
        change = source.choices((change_config, change_weights, change_index, change_tokenizer), (5, 3, 1, 2))[0]
        if change is change_tokenizer:
            tiny_tokenizer().save_pretrained(folder)
        change(folder, source)
        seen[outcome(use_tokenizer if change is change_tokenizer else use_folder, folder)] += 1
        shutil.rmtree(folder)
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_folders_are_read_or_refused(seed, tmp_path, tiny_checkpoints):
    seen = campaign(tmp_path, tiny_checkpoints, seed, 100)
    assert set(seen) == {READ, REFUSED}, seen
    assert min(seen.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_many_folders_are_read_or_refused(seed, tmp_path, tiny_checkpoints):
    seen = campaign(tmp_path, tiny_checkpoints, seed, 1000)
    assert set(seen) == {READ, REFUSED}, seen
