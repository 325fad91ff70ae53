"""Tokenizers of GGUF files are kept: what is read again is what was built, and what is damaged is built again."""

from __future__ import annotations

import os

import pytest

from tests.tiny_gguf import tiny_model, write_tiny_gguf
from tests.transformers_patches.weights.gguf_cases import TEXTS, byte_level_vocabulary, sentencepiece_vocabulary
from transformers_patches.weights import gguf_tokenizer
from transformers_patches.weights.gguf_kept import MOST_KEPT
from transformers_patches.weights.model_files import load_tokenizer, read_config

VOCABULARIES = {"byte level": byte_level_vocabulary, "sentencepiece": sentencepiece_vocabulary}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The cache folder of one test."""
    monkeypatch.setenv("PARTINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


@pytest.fixture
def builds(monkeypatch) -> list:
    """Gets an entry for each tokenizer that is built."""
    made, build = [], gguf_tokenizer._built

    def counted(metadata):
        made.append(metadata)
        return build(metadata)

    monkeypatch.setattr(gguf_tokenizer, "_built", counted)
    return made


def write(path, vocabulary=byte_level_vocabulary):
    metadata = vocabulary()
    model = tiny_model("llama", vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    write_tiny_gguf(path, model=model, metadata=metadata)
    return path


def described(path) -> tuple:
    """All that an answer takes from a tokenizer, and from the config what the vocabulary says."""
    tokenizer, config = load_tokenizer(path), read_config(path)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    texts = [tokenizer.decode(one) for one in ids]
    special = (tokenizer.special_tokens_map, tokenizer.all_special_ids, tokenizer.chat_template)
    return ids, texts, special, (config.bos_token_id, config.eos_token_id, config.pad_token_id)


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
def test_what_was_kept_is_what_was_built(tmp_path, kept, builds, vocabulary):
    path = write(tmp_path / "model.gguf", vocabulary)
    first = described(path)
    assert described(path) == first
    assert len(builds) == 1
    assert len(list(kept.iterdir())) == 2


def test_a_file_that_was_written_again_is_another(tmp_path, kept, builds):
    path = write(tmp_path / "model.gguf")
    first = described(path)
    write(path, sentencepiece_vocabulary)
    assert described(path) != first
    assert len(builds) == 2
    assert len(list(kept.iterdir())) == 2  # the earlier entry is gone


@pytest.mark.parametrize("ending", ["tokenizer.json", "facts"])
@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: "", lambda text: text.replace("1", "2")])
def test_damaged_entries_are_built_again(tmp_path, kept, builds, ending, damage):
    path = write(tmp_path / "model.gguf")
    first = described(path)
    entry = next(kept.glob(f"*.{ending}"))
    before = entry.read_text(encoding="utf-8")
    entry.write_text(damage(before), encoding="utf-8")
    assert load_tokenizer(path)(TEXTS[0]).input_ids == first[0][0]
    assert len(builds) == 2
    assert entry.read_text(encoding="utf-8") == before
    assert described(path) == first


@pytest.mark.skipif(os.name != "posix", reason="a file stands where the folder would be made")
def test_a_cache_that_can_not_be_written_changes_nothing(tmp_path, kept, builds):
    (tmp_path / "cache").write_text("no folder")
    path = write(tmp_path / "model.gguf")
    assert described(path) == described(path)
    assert len(builds) == 2


def test_only_the_newest_are_kept(tmp_path, kept):
    for number in range(MOST_KEPT + 2):
        load_tokenizer(write(tmp_path / f"{number}.gguf"))
    assert len(list(kept.iterdir())) == 2 * MOST_KEPT
