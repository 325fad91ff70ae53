"""Checkpoint folders: whole tensors, rows and columns as they are in the file, bytes counted, damage reported."""

import json

import pytest
import torch
from safetensors.torch import save_file

from transformers_patches.errors import PartInferError
from transformers_patches.weights import safetensors_folder as checkpoint_module
from transformers_patches.weights.safetensors_folder import Checkpoint
from transformers_patches.weights.source import Source

TENSORS = {
    "matrix": torch.randn(10, 6, generator=torch.Generator().manual_seed(0)),
    "bias": torch.arange(10.0),
    "scalar": torch.tensor(3.5),
    "half": torch.randn(10, 6, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
}


@pytest.fixture(params=["single", "sharded"])
def folder(request, tmp_path):
    if request.param == "single":
        save_file(TENSORS, tmp_path / "model.safetensors")
        return tmp_path
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, tmp_path / weight_map[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.fixture(params=[1, 50, 2**25], ids=lambda size: f"chunks of {size} bytes")
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "BLOCK_BYTES", request.param)


def test_names_shapes_and_sizes(folder):
    checkpoint = Checkpoint(folder)
    assert checkpoint.names() == set(TENSORS)
    assert checkpoint.shape("matrix") == (10, 6)
    assert checkpoint.shape("scalar") == ()
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in TENSORS.items()}
    assert {name: checkpoint.nbytes(name) for name in TENSORS} == sizes
    assert checkpoint.total_bytes() == sum(sizes.values())
    assert checkpoint.bytes_read == 0


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TENSORS)
def test_whole_tensors_are_read_and_converted(folder, name, dtype):
    checkpoint = Checkpoint(folder)
    out = torch.full(TENSORS[name].shape, float("nan"), dtype=dtype)
    checkpoint.read_into(name, out)
    assert torch.equal(out, TENSORS[name].to(dtype))
    assert checkpoint.bytes_read == checkpoint.nbytes(name)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("name", ["matrix", "bias", "half"])
def test_rows_are_read_in_the_order_asked_for(folder, name):
    rows = torch.tensor([7, 0, 9, 3])
    checkpoint = Checkpoint(folder)
    out = torch.full((4, *TENSORS[name].shape[1:]), float("nan"))
    checkpoint.read_into(name, out, rows)
    assert torch.equal(out, TENSORS[name][rows].float())
    assert checkpoint.bytes_read == checkpoint.nbytes(name) * 4 // 10


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("name", ["matrix", "half"])
def test_columns_are_read_transposed(folder, name):
    columns = torch.tensor([5, 1, 2])
    checkpoint = Checkpoint(folder)
    out = torch.full((3, 10), float("nan"))
    checkpoint.read_columns_into(Source(name, "columns", columns), out)
    assert torch.equal(out, TENSORS[name][:, columns].t().float())
    assert checkpoint.bytes_read == checkpoint.nbytes(name)


def test_no_weights_are_an_error(tmp_path):
    with pytest.raises(PartInferError, match="has no model.safetensors: fetch a model"):
        Checkpoint(tmp_path)


def test_bin_files_only_name_the_command_that_converts_them(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(PartInferError, match=r"has only pytorch_model\*.bin: python download.py converts"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_an_error(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PartInferError, match=r"model.safetensors can't be read \(truncated\?\).*fetch the model again"):
        Checkpoint(tmp_path)


def sharded(folder, weight_map) -> None:
    save_file({"matrix": TENSORS["matrix"]}, folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path, {"matrix": "model-1.safetensors", "bias": "model-2.safetensors"})
    with pytest.raises(PartInferError, match="names .*model-2.safetensors, which is not there"):
        Checkpoint(tmp_path)


def test_a_truncated_shard_is_named_when_it_is_read(tmp_path):
    sharded(tmp_path, {"matrix": "model-1.safetensors"})
    path = tmp_path / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(PartInferError, match="model-1.safetensors can't be read"):
        Checkpoint(tmp_path).read_into("matrix", torch.empty(10, 6))


def test_a_tensor_that_its_shard_lacks_is_an_error(tmp_path):
    sharded(tmp_path, {"bias": "model-1.safetensors"})
    with pytest.raises(PartInferError, match="model-1.safetensors lacks bias, which the index says it has"):
        Checkpoint(tmp_path).shape("bias")


@pytest.mark.parametrize("text", ["", '{"weight_map": {"matrix"', "{}", "[]", '{"weight_map": []}'])
def test_a_damaged_index_is_an_error(tmp_path, text):
    sharded(tmp_path, {})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(PartInferError, match="index.json .*fetch the model again"):
        Checkpoint(tmp_path)
