"""Packs are whole or not there: one writer at a time, synced, nothing left by killed ones."""

from __future__ import annotations

import os
import stat
import threading

import pytest
import torch

from tests.conftest import fill
from tests.killed import hidden, run_killed
from tests.tiny_tokenizer import tiny_tokenizer
from tests.transformers_patches.model_passes import DATASET, MODEL, logits
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.locks import exclusive

SETTINGS = PartInferConfig(start_num=1, end_num=4, device="cpu", dtype="float32")


@pytest.fixture
def source(tiny_checkpoints, tmp_path):
    """A tiny model with a tokenizer."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in tiny_checkpoints["llama"].iterdir():
        os.link(path, folder / path.name)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pack(source, output) -> dict:
    return write_pack(source, output, SETTINGS, DATASET, MODEL)


def test_everything_is_synced_before_it_gets_its_name_and_the_umask_holds(source, tmp_path, monkeypatch):
    synced, renamed = set(), []
    fsync, replace = os.fsync, os.replace

    def recording(descriptor):
        fsync(descriptor)
        synced.add((os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino))

    def noting(old, new):
        renamed.append((str(new), set(synced)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(os, "replace", noting)
    before = os.umask(0o027)
    try:
        pack(source, tmp_path / "pack")
    finally:
        os.umask(before)
    name, there = renamed[-1]
    assert name == str(tmp_path / "pack")
    written = [tmp_path / "pack", *(tmp_path / "pack").rglob("*")]
    assert {"config.json", "tokenizer.json", "neurons"} <= {path.name for path in written}
    assert [path for path in written if (path.stat().st_dev, path.stat().st_ino) not in there] == []
    assert (tmp_path.stat().st_dev, tmp_path.stat().st_ino) in synced
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_a_killed_writer_leaves_what_the_next_one_clears(source, tmp_path):
    output = tmp_path / "pack"
    code = f"""
from pathlib import Path
from tests.transformers_patches.load.test_pack_durability import pack
pack(Path({str(source)!r}), Path({str(output)!r}))
"""
    run_killed(code, nth=3)
    assert not output.exists()
    assert len(hidden(tmp_path)) == 2  # the folder and the lock
    pack(source, output)
    assert hidden(tmp_path) == []
    assert torch.equal(logits(load_model(output, SETTINGS)), logits(load_model(source, SETTINGS, DATASET, MODEL)))


def test_two_writers_at_once(source, tmp_path):
    output, ends = tmp_path / "pack", []

    def write():
        try:
            pack(source, output)
            ends.append("done")
        except PartInferError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert ends.count("done") == 1
    refused = (f"another run is writing {output}", f"{output} is there already")
    assert all(end == "done" or end.startswith(refused) for end in ends), ends
    assert hidden(tmp_path) == []
    assert torch.equal(logits(load_model(output, SETTINGS)), logits(load_model(source, SETTINGS, DATASET, MODEL)))


def test_a_folder_that_another_process_writes(source, tmp_path):
    with exclusive(tmp_path / "pack"), pytest.raises(PartInferError, match="another run is writing .*pack: wait"):
        pack(source, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_a_device_is_no_folder(source, tmp_path):
    (tmp_path / "pack").symlink_to("/dev/null")
    with pytest.raises(PartInferError, match="pack is there already"):
        pack(source, tmp_path / "pack")


def test_a_link_is_followed(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pack").symlink_to(tmp_path / "elsewhere" / "pack")
    pack(source, tmp_path / "pack")
    assert (tmp_path / "pack").is_symlink()
    assert (tmp_path / "elsewhere" / "pack" / "config.json").is_file()


def test_a_full_disk_leaves_nothing_and_the_error_names_the_pack(source, small_disk):
    fill(small_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        pack(source, small_disk / "pack")
    assert caught.value.filename == str(small_disk / "pack")
    assert os.listdir(small_disk) == ["filler"]
