"""Fingerprints: one model is one fingerprint in every dtype and file layout, another model another."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import FAMILIES, make_tiny_checkpoint
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.fingerprint import fingerprint, fingerprint_of_model
from transformers_patches.weights.model_files import read_config
from transformers_patches.weights.safetensors_folder import Checkpoint


def of_folder(folder) -> str:
    checkpoint = Checkpoint(folder)

    def read(name):
        if name not in checkpoint.names():
            raise KeyError(name)
        values = torch.empty(checkpoint.shape(name))
        checkpoint.read_into(name, values)
        return values

    return fingerprint(read_config(folder), read)


def test_dtype_and_shards_do_not_change_it(checkpoint, tmp_path):
    expected = of_folder(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert fingerprint_of_model(model) == expected
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert of_folder(tmp_path / "shards") == expected
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    assert of_folder(tmp_path / "bfloat16") == expected
    model.to(torch.float16).save_pretrained(tmp_path / "float16")  # holds every bfloat16 value of this size
    assert of_folder(tmp_path / "float16") == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_has_the_fingerprint_of_its_folder(checkpoint, dtype, neuron_files):
    loaded = load_model(checkpoint, PartInferConfig(dtype=dtype, device="cpu"), **neuron_files)
    assert fingerprint_of_model(loaded.model) == of_folder(checkpoint)


def test_families_differ(tiny_checkpoints):
    assert len({of_folder(folder) for folder in tiny_checkpoints.values()}) == len(FAMILIES)


def test_other_training_of_the_same_shape_differs(tiny_checkpoints, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoints["llama"], other)
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(99)
    weights = {name: torch.randn_like(w) if w.ndim == 1 else w for name, w in weights.items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert of_folder(other) != of_folder(tiny_checkpoints["llama"])


def test_saving_again_with_the_same_weights_is_the_same_model(tiny_checkpoints, tmp_path):
    assert of_folder(make_tiny_checkpoint(tmp_path / "again", "opt")) == of_folder(tiny_checkpoints["opt"])
