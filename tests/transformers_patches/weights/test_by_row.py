"""Weights that stay in their file: the same values, not in memory until they are used, and changes are noticed."""

import os
from pathlib import Path

import pytest
import torch

from transformers_patches import PartInferConfig, PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.weights import by_row
from transformers_patches.weights.by_row import RowsInFile

pytestmark = pytest.mark.skipif(not by_row.SUPPORTED, reason="needs Linux")
EVERYTHING = {"loaded_neurons_percent": 1.0, "sparsity": 0.7, "start_num": 0, "end_num": 3, "selection": "up"}


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(by_row, "LEAST", 1)


def bytes_in_memory(values: torch.Tensor) -> int:
    """Of the mapping that a tensor lies in, as the system reports."""
    inside, place = False, values.data_ptr()
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= place < end
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("no such mapping")


@pytest.mark.parametrize(("start", "held"), [(0, 0), (100, 0), (4096, 2**20), (5000, 300000)])
def test_the_bytes_of_a_file(tmp_path, start, held):
    path, count = tmp_path / "file", 3 * 2**20
    content = torch.randint(256, (start + count,), dtype=torch.uint8)
    path.write_bytes(content.numpy().tobytes())
    rows = RowsInFile()
    values = rows.tensor(path, start, count, held=held)
    assert rows.nbytes == count - held
    assert bytes_in_memory(values[-4096:]) < 2**20, "nothing behind the held part is read until it is used"
    assert torch.equal(values, content[start:])
    rows.give_back()
    assert bytes_in_memory(values[-4096:]) < 2**20
    assert torch.equal(values, content[start:])
    rows.check_unchanged()
    os.truncate(path, count - 1)
    with pytest.raises(PartInferError, match="was changed while it was in use"):
        rows.check_unchanged()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_model_whose_embedding_stays_in_its_file(tiny_checkpoints, tmp_path, monkeypatch, dtype):
    settings = PartInferConfig(dtype=dtype, **EVERYTHING)
    write_pack(tiny_checkpoints["qwen2"], tmp_path / "pack", settings)
    ids = torch.arange(1, 60)[None]
    with torch.inference_mode():
        in_file = load_model(tmp_path / "pack", settings)
        got = in_file.model(ids).logits
        monkeypatch.setattr(by_row, "SUPPORTED", False)
        in_memory = load_model(tmp_path / "pack", settings)
        assert torch.equal(got, in_memory.model(ids).logits)
    embedding = in_memory.model.get_input_embeddings().weight.nbytes
    assert in_file.report.bytes_in_file == embedding
    assert in_file.report.bytes_resident == in_memory.report.bytes_resident - embedding
    assert in_file.token_bytes() == in_memory.token_bytes()


def test_a_tied_embedding_is_in_memory(tiny_checkpoints):
    tied = load_model(tiny_checkpoints["smollm2"], PartInferConfig(**EVERYTHING))
    assert tied.report.bytes_in_file == 0


def test_a_checkpoint_that_changes_is_noticed(tiny_checkpoints, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_checkpoints["llama"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    loaded = load_model(folder, PartInferConfig(**EVERYTHING))
    assert loaded.report.bytes_in_file > 0
    os.utime(folder / "model.safetensors", (1, 1))
    with torch.inference_mode(), pytest.raises(PartInferError, match="was changed while it was in use"):
        loaded.model(torch.tensor([[1, 2]]))
