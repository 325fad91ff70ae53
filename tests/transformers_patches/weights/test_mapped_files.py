"""Mapped files: what is there, where they are not used, and packs whose weights stay in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import FAMILIES
from tests.tiny_tokenizer import tiny_tokenizer
from tests.transformers_patches.made_up_files import made_up_fit, with_statistics
from tests.transformers_patches.model_passes import logits
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.generation.generate import Conversation, GenerationOptions, generate
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.neurons.fit_file import FitFile, fit_path
from transformers_patches.weights import mapped_files
from transformers_patches.weights.mapped_files import MappedFiles, bring
from transformers_patches.weights.pack import Pack

NEURONS = with_statistics(1)
DTYPES = ("bfloat16", "int8", "int4")


@pytest.fixture
def huge(monkeypatch):
    """A system that maps any file in huge pages: test files are too small to be."""
    monkeypatch.setattr(mapped_files, "_SAMPLE", 64)
    monkeypatch.setattr(mapped_files, "_bytes_in_huge_pages", lambda _: 64)


def settings(**options) -> PartInferConfig:
    defaults = {"start_num": 1, "end_num": 4, "device": "cpu", "kernels": "native", "selection": "up"}
    return PartInferConfig(**(defaults | options))


def pack_of(checkpoint, folder, **options) -> None:
    path = folder / "neurons.safetensors"
    NEURONS.save(path)
    write_pack(checkpoint, folder / "pack", settings(dataset_neurons_filepath=str(path), **options))


def mapped_names(loaded: LoadedModel, folder) -> set[str]:
    """Weights that lie in mapped files of the folder, as the system tells."""
    ranges = []
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            if str(folder) in line:
                ranges.append([int(bound, 16) for bound in line.split()[0].split("-")])
    weights = dict(loaded.model.state_dict())
    return {n for n, w in weights.items() if any(first <= w.data_ptr() < last for first, last in ranges)}


def test_the_bytes_of_a_file(huge, tmp_path):
    path, content = tmp_path / "file", bytes(range(256)) * 20
    path.write_bytes(content)
    files = MappedFiles()
    part = files.tensor(path, 64, 1000)
    bring(part)
    assert bytes(part.numpy()) == content[64:1064]
    assert files.holds(part[10:].view(-1))
    assert not files.holds(torch.empty(4))
    part.fill_(0)
    assert path.read_bytes() == content, "memory is private"


@pytest.mark.parametrize("small", ["file", "pages", "switch"])
def test_files_are_not_mapped_where_that_is_slower(huge, tmp_path, monkeypatch, small):
    path = tmp_path / "file"
    path.write_bytes(bytes(100 if small == "file" else 5000))
    if small == "pages":
        monkeypatch.setattr(mapped_files, "_bytes_in_huge_pages", lambda _: 0)
    if small == "switch":
        monkeypatch.setenv(mapped_files.SWITCH, "off")
    assert MappedFiles().tensor(path, 0, 50) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mapped_pack_is_the_model(huge, native, tiny_checkpoints, tmp_path, family, dtype, monkeypatch):
    pack_of(tiny_checkpoints[family], tmp_path, dtype=dtype)
    mapped = load_model(tmp_path / "pack", settings())
    names = mapped_names(mapped, tmp_path)
    weights = mapped.model.state_dict()
    assert sum(weights[name].nbytes for name in names) > 0.9 * sum(weight.nbytes for weight in weights.values())
    monkeypatch.setenv(mapped_files.SWITCH, "off")
    read = load_model(tmp_path / "pack", settings())
    assert not mapped_names(read, tmp_path)
    assert all(torch.equal(weights[name], weight) for name, weight in read.model.state_dict().items())
    assert torch.equal(logits(mapped), logits(read))
    assert mapped.report.bytes_read == read.report.bytes_read
    for ours, theirs in zip(mapped.state.layers, read.state.layers, strict=True):
        for name in ours.rows.paired_names:  # rows take turns in the file, too
            ours_weight, theirs_weight = getattr(ours.rows, name), getattr(theirs.rows, name)
            if dtype == "bfloat16":
                assert ours_weight.stride() == theirs_weight.stride() == (2 * ours_weight.shape[1], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{"selection": "core"}, {"kernels": "torch"}, {"loaded_neurons_percent": 0.5}],
    ids=lambda o: next(iter(o)),
)
def test_other_layouts_and_fewer_neurons_than_packed(huge, native, tiny_checkpoints, tmp_path, dtype, options):
    """Rows that took turns when the pack was made are taken apart."""
    options = {"compensation": "none", **options}
    pack_of(tiny_checkpoints["llama"], tmp_path, dtype=dtype, compensation="none")
    packed = load_model(tmp_path / "pack", settings(**options))
    partial = load_model(
        tiny_checkpoints["llama"],
        settings(dtype=dtype, dataset_neurons_filepath=str(tmp_path / "neurons.safetensors"), **options),
    )
    ours, theirs = packed.model.state_dict(), partial.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(packed), logits(partial))
    assert not any("mlp" in name and "gate" in name and ".1." in name for name in mapped_names(packed, tmp_path))


def test_rows_that_a_fit_changes_do_not_stay_in_the_file(huge, native, tiny_checkpoints, tmp_path):
    FitFile.save(made_up_fit(), fit_path(tmp_path / "neurons.safetensors"))
    pack_of(tiny_checkpoints["llama"], tmp_path, dtype="bfloat16")
    files = {path: path.read_bytes() for path in (tmp_path / "pack").glob("*.safetensors")}
    packed = load_model(tmp_path / "pack", settings())
    assert packed.settings.compensation == "refit"
    names = mapped_names(packed, tmp_path)
    sparse = [name for name in packed.model.state_dict() if name.startswith("model.layers.2.mlp.")]
    assert {name for name in sparse if name in names} == {"model.layers.2.mlp.rows.up"}
    partial = load_model(
        tiny_checkpoints["llama"],
        settings(dtype="bfloat16", dataset_neurons_filepath=str(tmp_path / "neurons.safetensors")),
    )
    assert torch.equal(logits(packed), logits(partial))
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_truncated_file_is_told_before_it_is_mapped(huge, native, tiny_checkpoints, tmp_path):
    pack_of(tiny_checkpoints["llama"], tmp_path, dtype="bfloat16")
    shard = next((tmp_path / "pack").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(Exception, match="truncated"):
        load_model(tmp_path / "pack", settings())


def test_packs_of_earlier_versions_are_read(huge, native, tiny_checkpoints, tmp_path):
    """Their tensors lie as they happen to, those that are not aligned are copied."""
    from safetensors.torch import load_file, save_file

    pack_of(tiny_checkpoints["llama"], tmp_path, dtype="bfloat16", selection="core")
    expected = logits(load_model(tmp_path / "pack", settings(selection="core")))
    for shard in (tmp_path / "pack").glob("*.safetensors"):
        save_file(load_file(shard), shard)
    assert Pack(tmp_path / "pack").names()
    assert torch.equal(logits(load_model(tmp_path / "pack", settings(selection="core"))), expected)


def test_changed_files_are_told(huge, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(5000))
    files = MappedFiles()
    assert files.tensor(path, 0, 50) is not None
    files.check_unchanged()
    other = tmp_path / "other"
    other.write_bytes(bytes(5000))
    os.replace(other, path)  # the mapped file stays as it was
    files.check_unchanged()
    for change in (lambda: path.write_bytes(bytes(100)), lambda: path.write_bytes(b"1" * 5000)):
        path.write_bytes(bytes(5000))
        files = MappedFiles()
        files.tensor(path, 0, 50)
        files.check_unchanged()
        time.sleep(0.02)  # the clock of files is no finer
        change()
        with pytest.raises(PartInferError, match=f"{path} was changed while it was in use: start again"):
            files.check_unchanged()


def test_a_pack_that_changes_under_a_loaded_model_is_told_at_the_next_prompt(huge, native, tiny_checkpoints, tmp_path):
    pack_of(tiny_checkpoints["llama"], tmp_path, dtype="bfloat16")
    loaded = load_model(tmp_path / "pack", settings())
    assert mapped_names(loaded, tmp_path)
    before = logits(loaded)
    assert torch.equal(logits(loaded), before)
    shard = next((tmp_path / "pack").glob("*.safetensors"))
    with open(shard, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    with pytest.raises(PartInferError, match=f"{shard} was changed while it was in use"):
        logits(loaded)


def test_a_pack_that_changes_during_an_answer_is_told_at_its_end(huge, native, tiny_checkpoints, tmp_path):
    pack_of(tiny_checkpoints["llama"], tmp_path, dtype="bfloat16")
    loaded, conversation = load_model(tmp_path / "pack", settings()), Conversation()
    shard = next((tmp_path / "pack").glob("*.safetensors"))
    options, tokens = GenerationOptions(max_new_tokens=6), tiny_tokenizer()

    def write(_piece: str) -> None:
        time.sleep(0.02)  # the clock of files is no finer
        with open(shard, "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))

    assert generate(loaded, tokens, [5, 6, 7], options, conversation=conversation).token_ids
    with pytest.raises(PartInferError, match=f"{shard} was changed while it was in use"):
        generate(loaded, tokens, [5, 6, 7], options, write, conversation)
    assert conversation.token_ids == []


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "norm"), ("int8", "scales."), ("int4", "scales.")])
def test_small_mapped_tensors_are_finite(huge, native, tiny_checkpoints, tmp_path, dtype, kind):
    """Norms and scales; what is large is not touched before it is used, and then the logits tell."""
    pack_of(tiny_checkpoints["llama"], tmp_path, dtype=dtype)
    shard = next((tmp_path / "pack").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in sorted(header) if kind in name and header[name]["dtype"] in ("BF16", "F16", "F32"))
    start, end = (8 + size + offset for offset in header[name]["data_offsets"])
    data[start:end] = b"\xff" * (end - start)
    shard.write_bytes(data)
    with pytest.raises(PartInferError, match=f"{name} has values that are not finite"):
        load_model(tmp_path / "pack", settings())


CUT_OFF = """
import sys
import torch
from pathlib import Path
from transformers_patches import kernels
from transformers_patches.weights import mapped_files
mapped_files._SAMPLE, mapped_files._bytes_in_huge_pages = 64, lambda _: 64
path = Path(sys.argv[1])
whole = mapped_files.MappedFiles().tensor(path, 0, 2**20)
torch.set_num_threads(2)
print(kernels.linear(torch.ones(1, 512), whole.view(torch.float32).view(512, 512)).sum().item(), flush=True)
with open(path, "r+b") as file:
    file.truncate(4096)
kernels.linear(torch.ones(1, 512), whole.view(torch.float32).view(512, 512))
print("not reached")
"""


def test_a_file_that_is_cut_off_in_use_ends_with_a_line(native, tmp_path):
    (tmp_path / "file").write_bytes(bytes(2**20))
    command = [sys.executable, "-c", CUT_OFF, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert (done.returncode, done.stdout) == (1, "0.0\n"), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: a file that weights are mapped from was cut off")
