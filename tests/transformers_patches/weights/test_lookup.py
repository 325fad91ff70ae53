"""Where models are found, and what they are called behind links and in the hub's cache."""

from __future__ import annotations

import pytest

from transformers_patches.errors import PartInferError
from transformers_patches.weights.file_kinds import is_gguf
from transformers_patches.weights.lookup import find_model, model_name, model_names


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    return folder


@pytest.mark.parametrize(
    "name",
    ["models/SmolLM2-360M-Instruct", "SmolLM2-360M-Instruct", "smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct"],
)
def test_paths_names_short_names_and_hub_ids_find_the_model(here, name):
    make_model(here / "models" / "SmolLM2-360M-Instruct")
    assert find_model(name).as_posix() == "models/SmolLM2-360M-Instruct"


def test_the_path_wins_over_the_name(here):
    own = make_model(here / "elsewhere" / "mine")
    assert find_model("smollm2-360m", own) == own
    assert find_model(None, str(own)) == own


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("opt-6.7b", None, "no model at models/opt-6.7b: fetch it with python download.py --model_name opt-6.7b"),
        ("opt-6.7b", "empty", r"no model at empty \(config.json is missing\): .* --model_name NAME"),
        ("empty", None, r"no model at empty \(config.json is missing\)"),
        ("note.txt", None, r"no model at note.txt \(neither a folder nor a GGUF file\)"),
        ("/nowhere/at/all", None, "no model at /nowhere/at/all"),
        ("never-heard-of", None, "unknown model 'never-heard-of'"),
    ],
)
def test_no_model_is_one_line_that_says_how_to_get_it(here, name, path, message):
    (here / "empty").mkdir()
    (here / "note.txt").write_text("no model")
    with pytest.raises(PartInferError, match=message):
        find_model(name, path)


@pytest.fixture
def cache(tmp_path):
    """The hub's cache: files by their hashes, and links to them under the commit's folder."""
    repository = tmp_path / "hub" / "models--Owner--Some-Model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "b179c9").write_bytes(b"GGUF and so on")
    snapshot = repository / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (snapshot / "Some-Model-Q4_K_M.gguf").symlink_to("../../blobs/b179c9")
    return repository


def test_names_in_the_hubs_cache_are_the_models(cache, monkeypatch):
    snapshot = cache / "snapshots" / "0a1b2c"
    assert model_name(snapshot) == "Some-Model"
    assert model_name(snapshot / "Some-Model-Q4_K_M.gguf") == "Some-Model"
    monkeypatch.chdir(snapshot)
    assert model_name(".") == "Some-Model"


def test_a_file_without_an_ending_is_gguf_by_its_first_bytes(cache):
    blob = cache / "blobs" / "b179c9"
    assert is_gguf(blob)
    assert find_model(blob) == blob
    assert not is_gguf(cache / "snapshots" / "0a1b2c" / "config.json")
    assert not is_gguf(cache)


def test_links_keep_their_name_and_what_is_behind_them_is_tried_next(cache, tmp_path):
    folder, file = tmp_path / "mine", tmp_path / "my-own-Q8_0.gguf"
    folder.symlink_to(cache / "snapshots" / "0a1b2c")
    file.symlink_to(cache / "blobs" / "b179c9")
    assert model_names(folder) == ["mine", "Some-Model"]
    assert model_names(file) == ["my-own", "b179c9"]
    assert model_names(cache / "snapshots" / "0a1b2c") == ["Some-Model"]
