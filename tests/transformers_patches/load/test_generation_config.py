"""A model's own generation config: what is honoured, named, refused; the tokens are transformers'."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import make_tiny_checkpoint
from tests.tiny_tokenizer import tiny_tokenizer
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.generation.generate import GenerationOptions, generate
from transformers_patches.load.loader import load_model

PROMPT = [5, 17, 33, 40, 21]
GREEDY = GenerationOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    """A checkpoint folder of the test's own: write(text or settings, file) replaces one of its files."""
    return shutil.copytree(checkpoint_folder, tmp_path / "model")


def write(folder, content, name="generation_config.json") -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def load(folder):
    return load_model(folder, PartInferConfig(method="dense", dtype="float32", device="cpu"))


def ours(folder) -> list[int]:
    return generate(load(folder), tiny_tokenizer(), PROMPT, GREEDY).token_ids


def theirs(folder, **changes) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": 12, "do_sample": False, "tokenizer": tiny_tokenizer()} | changes
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()


@pytest.fixture
def plain(folder) -> list[int]:
    """Greedy tokens without an end token."""
    write(folder, {})
    return ours(folder)


def test_honoured_settings_give_the_tokens_of_transformers(folder, plain):
    third, fifth = plain[2], plain[4]
    for settings in (
        {"eos_token_id": [fifth, 1]},
        {"eos_token_id": fifth, "min_new_tokens": 8},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [third]},
        {"begin_suppress_tokens": [plain[0]]},
        {"bad_words_ids": [[plain[1], third]]},
        {"sequence_bias": [[[fifth], 9.5]]},
        {"forced_eos_token_id": 7},
        {"encoder_repetition_penalty": 2.5},
        {"stop_strings": [tiny_tokenizer().decode(next([t] for t in plain if 3 < t < 100))]},
    ):
        write(folder, settings)
        tokens = ours(folder)
        assert tokens == theirs(folder), settings
        assert tokens != plain, settings


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_use_cache_false_changes_no_token(folder, plain, place):
    if place == "config.json":
        (folder / "generation_config.json").unlink()
    content = json.loads((folder / place).read_text()) | {"use_cache": False}
    write(folder, content, place)
    assert ours(folder) == theirs(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 2.0},
        {"num_return_sequences": 2, "num_beams": 2},
        {"penalty_alpha": 0.6},
        {"dola_layers": "low"},
        {"token_healing": True},
    ],
)
def test_what_is_not_honoured_is_named_once_and_changes_nothing(folder, plain, settings, caplog):
    write(folder, settings)
    with caplog.at_level(logging.WARNING):
        tokens = ours(folder)
    assert tokens == plain
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("transformers_patches")]
    assert message.endswith(f"generation_config.json: not used here: {', '.join(settings)}")


def test_usual_files_need_no_word(folder, caplog):
    usual = {"bos_token_id": 1, "pad_token_id": -1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6}
    usual |= {
        "top_p": 0.9,
        "top_k": 20,
        "use_cache": True,
        "max_length": 4096,
        "num_beams": 1,
        "_from_model_config": True,
    }
    write(folder, usual | {"transformers_version": "4.40.0", "chat_format": "chatml", "repetition_penalty": 1.0})
    with caplog.at_level(logging.WARNING):
        loaded = load(folder)
    assert not [r for r in caplog.records if r.name.startswith("transformers_patches")]
    assert loaded.model.generation_config.eos_token_id == [2, 3]
    assert loaded.model.generation_config.pad_token_id is None


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"eos_token_id": ', "generation_config.json can't be read: Expecting value"),
        ("[1, 2]", "expected names and values, got list"),
        ("[" * 100_000, "generation_config.json can't be read"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of some, got '</s>'"),
        ({"eos_token_id": [2, "3"]}, "eos_token_id must be a token id or a list"),
        ({"eos_token_id": True}, "eos_token_id must be a token id"),
        ({"eos_token_id": 2.5}, "eos_token_id must be a token id"),
        ({"repetition_penalty": "1.2"}, "repetition_penalty must be a number above 0, got '1.2'"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, got 0"),
        ('{"repetition_penalty": NaN}', "repetition_penalty must be a number above 0, got nan"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be a whole number"),
        ({"suppress_tokens": [500]}, "suppress_tokens has 500, but the model's token ids are 0 to 127"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be a list of lists"),
        ({"stop_strings": [""]}, "stop_strings must be a text or a list of texts"),
        ({"renormalize_logits": "false"}, "renormalize_logits must be true or false"),
        ({"min_p": 1.5}, "min_p must be a number from 0 to 1"),
    ],
)
def test_damaged_files_and_wrong_values_are_refused(folder, content, message):
    write(folder, content)
    with pytest.raises(PartInferError, match=message.replace("[", r"\[")) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_utf8_are_refused(folder):
    (folder / "generation_config.json").write_bytes(b'{"stop_strings": "caf\xe9"}')
    with pytest.raises(PartInferError, match=r"can't be read: 'utf-8' codec can't decode byte 0xe9"):
        load(folder)
