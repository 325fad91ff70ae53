"""Tiny models with tokenizers, and the stand-in hub."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest

from tests.conftest import make_tiny_checkpoint
from tests.downloads.hub_server import StandInHub

UNREACHABLE = "http://127.0.0.1:9"  # the discard port: nothing listens there


def add_tokenizer(folder: Path) -> Path:
    """A word-level tokenizer, enough for AutoTokenizer."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4, "<unk>": 5}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"})
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A complete sharded Llama folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    return add_tokenizer(make_tiny_checkpoint(folder, "llama", max_shard_size="60KB"))


def use_endpoint(monkeypatch, url: str) -> None:
    """What HF_ENDPOINT does when it is set before the hub library is imported."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> StandInHub:
    """A stand-in hub that knows no repositories yet, in place of the real one; no cache of earlier tests."""
    stand_in = StandInHub()
    server = stand_in.start()
    use_endpoint(monkeypatch, stand_in.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield stand_in
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_hub(monkeypatch) -> None:
    use_endpoint(monkeypatch, UNREACHABLE)
