"""Downloads that are killed, that meet a full disk, that go through links; and tokens that are never shown."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from downloads import bin_convert
from downloads.catalog import KnownModel
from downloads.folder import publish, write_manifest
from downloads.model import download_model
from tests.conftest import fill, make_tiny_checkpoint
from tests.downloads.conftest import add_tokenizer, contents
from tests.killed import hidden, run_killed
from transformers_patches import cli
from transformers_patches.errors import PartInferError
from transformers_patches.hub_tokens import checked_token, without_tokens

MODEL = KnownModel("acme/tiny")
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def only_bin(tmp_path) -> Path:
    """A model folder of somebody's with .bin files only."""
    folder = add_tokenizer(make_tiny_checkpoint(tmp_path / "model", "opt"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_conversion_that_is_killed_is_done_by_the_next_run(only_bin, monkeypatch):
    code = f"""
from downloads import bin_convert
from downloads.catalog import KnownModel
from downloads.model import download_model
from pathlib import Path
convert = bin_convert.convert_bin
bin_convert.convert_bin = lambda source, target: convert(source, target, 20_000)
download_model(KnownModel("acme/tiny"), Path({str(only_bin)!r}))
"""
    run_killed(code, nth=4)  # the index beside the shards, two shards, and not the third
    before = set(contents(only_bin))
    assert len([name for name in before if name.startswith("model-0")]) == 2
    assert len(hidden(only_bin.parent)) == 2  # the folder and the lock
    assert download_model(MODEL, only_bin).source == "disk"
    assert hidden(only_bin.parent) == []
    stored = torch.load(only_bin / "pytorch_model.bin", weights_only=True)
    converted = load_file(only_bin / "model.safetensors")
    assert all(torch.equal(converted[name], stored[name]) for name in stored if name != "lm_head.weight")


@pytest.mark.parametrize("when", ["while writing", "before"])
def test_a_full_disk_while_converting_leaves_nothing(only_bin, small_disk, monkeypatch, when):
    folder = small_disk / "model"
    folder.mkdir()
    for name, content in contents(only_bin).items():
        (folder / name).write_bytes(content)
    if when == "before":
        monkeypatch.setattr(bin_convert, "save_file", lambda *_a, **_k: pytest.fail("written to a full disk"))
    else:
        monkeypatch.setattr("downloads.model.check_free_space", lambda *_: None)
    fill(small_disk)
    before = contents(folder)
    with pytest.raises((PartInferError, OSError)) as caught:
        download_model(MODEL, folder)
    assert str(small_disk) in str(caught.value)
    assert contents(folder) == before
    assert [name for name in os.listdir(small_disk) if "partial" in name] == []


def test_a_link_to_a_folder_on_another_disk_stays_one(hub, tiny_model, tmp_path):
    hub.repositories["models/acme/tiny"] = contents(tiny_model)
    (tmp_path / "large").mkdir()
    link = tmp_path / "tiny"
    link.symlink_to(tmp_path / "large" / "tiny")
    download_model(MODEL, link)
    next((tmp_path / "large" / "tiny").glob("*.safetensors")).unlink()
    assert not download_model(MODEL, link).already_there
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path / "large")) == ["tiny"]


def test_a_complete_model_on_a_disk_that_is_read_only(tiny_model, small_disk):
    folder = small_disk / "tiny"
    folder.mkdir()
    for name, content in contents(tiny_model).items():
        (folder / name).write_bytes(content)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    if subprocess.run(remount, capture_output=True, check=False).returncode != 0:
        pytest.skip("the disk can't be made read-only")
    assert download_model(MODEL, folder).already_there


def test_published_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        (tmp_path / "finished").mkdir()
        save_file({"a": torch.zeros(2)}, tmp_path / "finished" / "a.safetensors")
        (tmp_path / "finished" / "a.safetensors").chmod(0o600)
        write_manifest(tmp_path / "finished", "acme/tiny", "hub", None)
        publish(tmp_path / "finished", tmp_path / "target")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "target").iterdir()}
    assert modes == {0o640}


BAD = {
    "": "is empty",
    f"{TOKEN}\r": "whitespace",
    f"{TOKEN} x": "whitespace",
    "hf_\x00se": "control",
    "hf_é": "not ASCII",
}


@pytest.mark.parametrize("token", BAD)
def test_a_token_that_can_be_none_is_refused_and_not_shown(hub, tmp_path, token):
    with pytest.raises(PartInferError, match=f"the hub token in --token .*{BAD[token]}") as caught:
        download_model(MODEL, tmp_path / "tiny", token=token)
    assert "secret" not in str(caught.value)
    assert hub.requests == []


def test_tokens_that_the_library_would_find(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")  # the library takes the end of the line off
    assert checked_token(None) is None
    monkeypatch.setenv("HF_TOKEN", "hf_sec ret")
    with pytest.raises(PartInferError, match="the hub token in HF_TOKEN has whitespace at place 7 of 10") as caught:
        checked_token(None)
    assert "ret" not in str(caught.value).replace("whitespace", "")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_sec\x1bret")
    with pytest.raises(PartInferError, match="in the file of hf auth login has a control character"):
        checked_token(None)


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_script_shows_a_token(monkeypatch, capsys, debug):
    def fail():
        raise RuntimeError(f"Illegal header value b'Bearer {TOKEN}'")

    monkeypatch.setattr("sys.argv", ["download.py", *debug])
    assert cli.guarded(fail) == 1
    said = capsys.readouterr().err
    assert "Bearer <token>" in said
    assert TOKEN not in said


def test_tokens_are_taken_out_of_messages(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-another-kind")
    text = f"Illegal header value b'Bearer {TOKEN}', no of-another-kind, nor Bearer abc"
    assert without_tokens(text) == "Illegal header value b'Bearer <token>', no <token>, nor Bearer <token>"
