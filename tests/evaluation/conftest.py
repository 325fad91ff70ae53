"""A tiny tokenizer beside a tiny model, so that whole evaluations run in memory and without a hub."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.conftest import INTERMEDIATE, LAYERS, make_tiny_checkpoint, random_neuron_file

SETTINGS = {"start_num": 1, "end_num": 4}  # the tiny model's sparse layers


def _characters() -> Tokenizer:
    """One token per character; 0, 1 and 2 are padding, beginning and end, as the tiny models say."""
    letters = " \n" + string.ascii_letters + string.digits + string.punctuation
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")
    PreTrainedTokenizerFast(
        tokenizer_object=_characters(), pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
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
