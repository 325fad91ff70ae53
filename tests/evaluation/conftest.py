"""A tiny tokenizer beside a tiny model, so that whole evaluations run in memory and without a hub."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest

from tests.conftest import INTERMEDIATE, LAYERS, make_tiny_checkpoint, random_neuron_file
from tests.tiny_tokenizer import tiny_tokenizer

SETTINGS = {"start_num": 1, "end_num": 4}  # the tiny model's sparse layers


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ranking_paths(tmp_path_factory) -> dict[str, str]:
    """Flags and paths of neuron files that fit the tiny model."""
    folder = tmp_path_factory.mktemp("neurons")
    paths = {}
    for seed, name in enumerate(("dataset_neurons_filepath", "model_neurons_filepath")):
        path = folder / f"{name}.safetensors"
        random_neuron_file(seed + 1, LAYERS, INTERMEDIATE).save(path)
        paths[name] = str(path)
    return paths


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """Made-up rows in the layout that the local tasks read."""
    root = tmp_path_factory.mktemp("data")
    rows = [{"goal": f"open jar {i}", "sol1": f"turn the lid {i}", "sol2": "sing", "label": 0} for i in range(8)]
    _write_rows(root / "piqa" / "validation.jsonl", rows)
    rows = [{"question": f"What is {i} and {i}?", "answer": str(2 * i), "aliases": [str(2 * i)]} for i in range(8)]
    _write_rows(root / "triviaqa" / "triviaqa_sm_sub.jsonl", rows)
    return root


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """1,500 random letters and spaces, as one text."""
    generator = random.Random(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(generator.choice(string.ascii_lowercase + " ") for _ in range(1500)), encoding="utf-8")
    return path
