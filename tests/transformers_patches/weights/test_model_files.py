"""Model folders with code of their own: it is never run, nobody is asked, and one line says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import partinfer
from profiler.placement import checkpoint_fingerprint, load_for_profiling
from tests.tiny_tokenizer import tiny_tokenizer
from transformers_patches import cli
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.weights.model_files import load_tokenizer, read_config

CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that the folder's code would make. Whoever asks is answered with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the model's code"))
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "the model's code was run"


@pytest.fixture
def folder(tiny_checkpoints, tmp_path, mark) -> Path:
    """A Llama with a tokenizer and code of its own for everything, which transformers does not need."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoints["llama"], folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoModel": "own.OwnModel"}
    change(folder / "config.json", auto_map=classes)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]})
    return folder


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_transformers_own_classes_are_taken(folder):
    loaded = load_model(folder, PartInferConfig(method="dense", device="cpu"))
    assert type(loaded.model).__module__.startswith("transformers.")
    assert type(load_tokenizer(folder)).__module__.startswith("transformers.")
    assert type(load_for_profiling(folder, "cpu", "float32", 1, 8).model).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    "reader", [read_config, checkpoint_fingerprint, lambda path: load_model(path, PartInferConfig())]
)
def test_an_architecture_that_only_the_code_knows(folder, reader):
    change(folder / "config.json", model_type="own", architectures=["OwnModel"])
    with pytest.raises(
        PartInferError, match=r"config.json asks for code that comes with the model \(auto_map\)"
    ) as caught:
        reader(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_only_the_code_knows(folder):
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    with pytest.raises(
        PartInferError, match=r"tokenizer_config.json asks for code that comes with .*, which is never run"
    ):
        load_tokenizer(folder)


def test_the_script_says_it_in_one_line(folder, capsys):
    change(folder / "config.json", model_type="own", architectures=["OwnModel"])
    assert cli.guarded(lambda: partinfer.main(["--checkpoint_path", str(folder), "--method", "dense"])) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}/config.json asks for code")
