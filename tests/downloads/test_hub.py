"""Models from a stand-in hub: only what is needed, taken up again, never half there, errors in one line."""

from __future__ import annotations

import errno
import threading
import time
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from downloads import folder as folders
from downloads.catalog import KnownModel
from downloads.folder import MANIFEST, work_folder
from downloads.hub import HubUnreachable, needed_files
from downloads.model import download_model
from tests.conftest import make_tiny_checkpoint
from tests.downloads.conftest import add_tokenizer, contents
from transformers_patches.errors import PartInferError
from transformers_patches.locks import exclusive

MODEL = KnownModel("acme/tiny")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "models" / "tiny"


@pytest.fixture
def filled_hub(hub, tiny_model):
    hub.repositories["models/acme/tiny"] = contents(tiny_model) | {
        "README.md": b"# tiny",
        "consolidated.safetensors": b"the same weights once more",
        "onnx/model.onnx": b"and again",
    }
    return hub


def test_model_is_fetched_and_loads(filled_hub, tiny_model, target):
    fetched = download_model(MODEL, target)
    assert (fetched.source, fetched.already_there) == ("hub", False)
    assert set(filled_hub.fetched()) == set(contents(tiny_model))  # nothing that is not needed
    got = contents(target)
    assert {name: got[name] for name in got if name != MANIFEST} == contents(tiny_model)
    assert fetched.bytes == sum(len(content) for content in contents(tiny_model).values())
    model = AutoModelForCausalLM.from_pretrained(target)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = AutoTokenizer.from_pretrained(target)("hello world", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert not work_folder(target).exists()


def test_complete_model_needs_no_network(filled_hub, target):
    download_model(MODEL, target)
    filled_hub.requests.clear()
    assert download_model(MODEL, target).already_there
    assert filled_hub.requests == []


def test_cut_connection_is_taken_up_where_it_broke(filled_hub, tiny_model, target, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is written to disk at once
    name = next(name for name in contents(tiny_model) if "00001-of" in name)
    filled_hub.cut[name] = 1
    download_model(MODEL, target)
    ranges = [asked for method, path, asked in filled_hub.requests if path.endswith(name) and method == "GET"]
    size = len(contents(tiny_model)[name])
    assert ranges == [None, f"bytes={size // 2 // 1000 * 1000}-"]
    assert contents(target)[name] == contents(tiny_model)[name]


def test_interrupted_download_leaves_nothing_that_looks_complete_and_goes_on(
    filled_hub, tiny_model, target, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _seconds: None)
    name = max(contents(tiny_model), key=lambda name: len(contents(tiny_model)[name]))
    filled_hub.cut[name] = 100
    with pytest.raises(HubUnreachable, match="run the command again"):
        download_model(MODEL, target)
    assert not target.exists()
    filled_hub.cut.clear()
    filled_hub.requests.clear()
    there = set(contents(work_folder(target) / "hub"))
    download_model(MODEL, target)
    assert name in filled_hub.fetched()
    assert not there & set(filled_hub.fetched()), "files that had arrived were fetched again"
    assert contents(target)[name] == contents(tiny_model)[name]


@pytest.mark.parametrize("harm", ["missing", "short"])
def test_damaged_folder_is_fetched_again(filled_hub, tiny_model, target, harm, capsys):
    download_model(MODEL, target)
    shard = sorted(target.glob("*.safetensors"))[0]
    if harm == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    assert not download_model(MODEL, target).already_there
    assert shard.name in capsys.readouterr().err
    assert shard.read_bytes() == contents(tiny_model)[shard.name]


def test_damaged_folder_with_files_of_somebody_else_is_left_alone(filled_hub, target):
    download_model(MODEL, target)
    sorted(target.glob("*.safetensors"))[0].unlink()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(PartInferError, match=r"holds other files, too \(notes.txt\)"):
        download_model(MODEL, target)
    assert (target / "notes.txt").read_text() == "mine"


def test_folder_put_there_by_hand(hub, tiny_model, target):
    target.mkdir(parents=True)
    for name, content in contents(tiny_model).items():
        (target / name).write_bytes(content)
    fetched = download_model(MODEL, target)
    assert (fetched.source, fetched.already_there, hub.requests) == ("disk", True, [])


@pytest.mark.parametrize(
    "name, cut, message",
    [
        ("config.json", None, "config.json is missing"),
        ("tokenizer.json", None, "the tokenizer is missing"),
        ("model-00001-of", None, "is missing"),
        ("model-00001-of", 100, "is cut off or damaged"),
        ("model-00001-of", 4, "is cut off or damaged"),
        ("model.safetensors.index", 30, "can't be read"),
    ],
)
def test_incomplete_folder_is_not_taken_as_complete(filled_hub, tiny_model, target, name, cut, message):
    target.mkdir(parents=True)
    for other, content in contents(tiny_model).items():
        hit = other.startswith(name)
        if not (hit and cut is None):
            (target / other).write_bytes(content[:cut] if hit else content)
    before = contents(target)
    with pytest.raises(PartInferError, match=message):
        download_model(MODEL, target)
    assert contents(target) == before  # somebody's files are not touched


def test_other_model_revision_or_source_in_the_folder(filled_hub, target):
    download_model(MODEL, target)
    with pytest.raises(PartInferError, match="holds model acme/tiny, asked for was acme/other"):
        download_model(KnownModel("acme/other"), target)
    with pytest.raises(PartInferError, match="holds revision main, asked for was v2"):
        download_model(MODEL, target, revision="v2")
    with pytest.raises(PartInferError, match="holds source hub, asked for was pypi"):
        download_model(MODEL, target, source="pypi")


def test_gated_model(filled_hub, target):
    filled_hub.gated.add("models/acme/tiny")
    with pytest.raises(PartInferError, match=r"acme/tiny is gated: accept its terms at https://.*--token"):
        download_model(MODEL, target)
    assert not target.exists()
    assert download_model(MODEL, target, token="good").source == "hub"


def test_unknown_model_and_revision(filled_hub, target):
    with pytest.raises(PartInferError, match="the hub has no model 'acme/none', or it is private"):
        download_model(KnownModel("acme/none"), target)
    with pytest.raises(PartInferError, match="acme/tiny has no revision 'v9'"):
        download_model(MODEL, target, revision="v9")
    assert not target.exists()


def test_no_network(no_hub, target):
    started = time.monotonic()
    with pytest.raises(HubUnreachable, match="no network, or the hub can't be reached"):
        download_model(MODEL, target)
    assert time.monotonic() - started < 20
    assert not target.exists()


def test_hub_out_of_order(filled_hub, target):
    filled_hub.status = 503
    with pytest.raises(HubUnreachable, match="the hub answered 503"):
        download_model(MODEL, target)


def test_too_little_disk_space_is_found_before_fetching(filled_hub, target, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _path: usage(10**6, 10**6 - 10, 10))
    with pytest.raises(PartInferError, match="not enough disk space"):
        download_model(MODEL, target)
    assert filled_hub.fetched() == []


def test_full_disk_is_one_line(filled_hub, target, monkeypatch, capsys):
    import download

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr("downloads.hub.snapshot_download", full)
    with pytest.raises(PartInferError, match=f"^disk full at {target}: free some space"):
        download.main(["--model_name", "acme/tiny", "--checkpoint_path", str(target)])
    assert not target.exists()


def test_second_download_of_the_same_model_waits(filled_hub, target, capsys):
    results = []
    with exclusive(target):
        second = threading.Thread(target=lambda: results.append(download_model(MODEL, target)))
        second.start()
        second.join(0.5)
        assert second.is_alive()
        assert not target.exists()
    second.join(30)
    assert results[0].source == "hub"
    assert "another run is writing" in capsys.readouterr().err


def test_bin_repository_becomes_safetensors(hub, target, tmp_path):
    source = add_tokenizer(make_tiny_checkpoint(tmp_path / "opt", "opt"))
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    hub.repositories["models/acme/tiny"] = contents(source)
    download_model(MODEL, target)
    names = set(contents(target))
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith(".bin")]
    got = load_file(target / "model.safetensors")
    del state["lm_head.weight"]
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], state[name]) for name in state)


def test_needed_files_prefers_safetensors():
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model", "flax_model.msgpack"]
    assert needed_files("a/b", names) == ["config.json", "model.safetensors", "tokenizer.model"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert needed_files("a/b", [*shards, "model.safetensors"]) == shards
    assert needed_files("a/b", ["pytorch_model.bin", "tf_model.h5"]) == ["pytorch_model.bin"]
    with pytest.raises(PartInferError, match="a/b has neither model.safetensors nor pytorch_model.bin"):
        needed_files("a/b", ["config.json", "adapter_model.safetensors"])
