"""pytorch_model*.bin to safetensors: the same tensors, in shards, tied ones once."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from downloads.bin_convert import convert_bin
from downloads.catalog import KnownModel
from downloads.model import download_model
from tests.conftest import make_tiny_checkpoint
from tests.downloads.conftest import add_tokenizer, contents
from transformers_patches.errors import PartInferError
from transformers_patches.weights.safetensors_folder import Checkpoint


def to_bin(folder, shards: int = 1, **options):
    """Replace a tiny OPT's safetensors by .bin files with a tied lm_head, as facebook/opt-* have them."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return state
    names = list(state)
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {key: state[key] for key in names[i::shards]}
        torch.save(part, folder / name, **options)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


def read_all(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def opt(tmp_path):
    return make_tiny_checkpoint(tmp_path / "opt", "opt")


@pytest.mark.parametrize("shards, shard_bytes", [(1, 2**30), (1, 40_000), (3, 2**30)])
def test_same_tensors_and_logits(opt, tmp_path, shards, shard_bytes):
    reference = AutoModelForCausalLM.from_pretrained(opt)
    state = to_bin(opt, shards)
    out = tmp_path / "out"
    out.mkdir()
    convert_bin(opt, out, shard_bytes)
    got = read_all(out)
    assert all(torch.equal(got[name], state[name]) for name in got)
    assert state.keys() - got.keys() <= {"lm_head.weight"}
    files = list(out.glob("*.safetensors"))
    if shards == 1 and shard_bytes == 2**30:
        assert contents(out).keys() == {"model.safetensors"}
        assert "lm_head.weight" not in got
    else:
        assert len(files) > 1
        assert Checkpoint(out).names() == got.keys()  # by the index
        biggest = max(tensor.nbytes for tensor in state.values())
        assert all(sum(t.nbytes for t in load_file(f).values()) <= max(shard_bytes, biggest) for f in files)
    (out / "config.json").write_bytes((opt / "config.json").read_bytes())
    ids = torch.arange(3, 20)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, reference(ids).logits)


def test_shared_tensors_that_the_config_does_not_tie_are_all_kept(opt, tmp_path):
    state = to_bin(opt)
    config = json.loads((opt / "config.json").read_text()) | {"tie_word_embeddings": False}
    (opt / "config.json").write_text(json.dumps(config))
    convert_bin(opt, tmp_path)
    got = load_file(tmp_path / "model.safetensors")
    assert got.keys() == state.keys()
    assert torch.equal(got["lm_head.weight"], state["lm_head.weight"])


def test_views_are_written_as_they_read(opt, tmp_path):
    """Transposed and sliced views of one storage, which safetensors itself refuses."""
    (opt / "model.safetensors").unlink()
    whole = torch.arange(24, dtype=torch.float16).reshape(4, 6)
    torch.save({"a": whole.t(), "b": whole[1:3], "c": whole}, opt / "pytorch_model.bin")
    convert_bin(opt, tmp_path)
    got = load_file(tmp_path / "model.safetensors")
    assert torch.equal(got["a"], whole.t())
    assert torch.equal(got["b"], whole[1:3])
    assert got["c"].dtype == torch.float16


def test_format_from_before_torch_1_6(opt, tmp_path):
    state = to_bin(opt, _use_new_zipfile_serialization=False)
    convert_bin(opt, tmp_path)
    got = load_file(tmp_path / "model.safetensors")
    assert torch.equal(got["model.decoder.embed_tokens.weight"], state["lm_head.weight"])


def test_truncated_file(opt, tmp_path):
    to_bin(opt)
    path = opt / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(PartInferError, match="pytorch_model.bin can't be read"):
        convert_bin(opt, tmp_path)


def test_code_in_the_file_is_not_run(opt, tmp_path):
    (opt / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    payload = type("Payload", (), {"__reduce__": lambda _self: (open, (str(ran), "w"))})()
    torch.save({"a": torch.zeros(1), "b": payload}, opt / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(PartInferError, match="pytorch_model.bin can't be read"):
        convert_bin(opt, tmp_path)
    assert not ran.exists()


def test_folder_by_hand_with_bin_files_gets_safetensors(opt):
    state = to_bin(add_tokenizer(opt), shards=2)
    before = contents(opt)
    fetched = download_model(KnownModel("acme/opt"), opt)
    assert fetched.source == "disk"
    after = contents(opt)
    assert before.items() <= after.items()  # nothing of somebody's is gone
    assert Checkpoint(opt).names() == state.keys()
