"""Exports: the planned neurons as a plain model, which gives the logits of the same partial load without this project."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import partinfer
from tests.conftest import FAMILIES, INTERMEDIATE, LAYERS
from tests.model_table import tiny_model
from tests.tiny_gguf import tiny_model as tiny_gguf_model
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_tokenizer import tiny_tokenizer
from tests.transformers_patches.made_up_files import made_up_fit, with_statistics
from tests.transformers_patches.weights.gguf_cases import byte_level_vocabulary
from tests.transformers_patches.weights.test_gguf_writer_models import GRANTED
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.export import write_export
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.neurons.fit_file import fit_path
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.weights.gguf_tokenizer import gguf_tokenizer

ALL = {"start_num": 0, "end_num": LAYERS - 1}
IDS = torch.arange(3, 15)[None]
WITH_BIAS = ("llama", "llama-mlp-bias", "smollm2", "opt")  # families whose FFNs have biases, or may have some


@pytest.fixture(scope="module")
def neurons(tmp_path_factory):
    """A neuron file with statistics."""
    path = tmp_path_factory.mktemp("neurons") / "neurons.safetensors"
    with_statistics(1).save(path)
    return path


def settings(neurons, **options) -> PartInferConfig:
    usual = {"loaded_neurons_percent": 0.7, "device": "cpu", "dtype": "float32"}
    return PartInferConfig(dataset_neurons_filepath=str(neurons), **usual | options)


def assert_same(folder, source, plan) -> None:
    """transformers' logits of an export are those of the partial load that the plan names."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = load_model(source, plan.settings).model(input_ids=IDS).logits
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_gives_the_same_logits(tiny_checkpoints, neurons, tmp_path, family):
    source = tiny_checkpoints[family]
    made = write_export(source, tmp_path / "out", settings(neurons, **ALL, compensation="none"))
    assert (made.plan.size, made.plan.notes) == (56, ())
    assert_same(tmp_path / "out", source, made.plan)
    assert made.bytes < made.bytes_dense
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < made.bytes_dense


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "nemotron", "granite", "olmo2"])
def test_architectures_that_are_found_by_looking(neurons, tmp_path, model_type):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "in")
    size, layers = 96, model.config.num_hidden_layers
    ranking = torch.stack([torch.randperm(size) for _ in range(layers)]).int()
    NeuronFile(ranking).save(tmp_path / "neurons.safetensors")
    chosen = settings(tmp_path / "neurons.safetensors", start_num=0, end_num=layers - 1)
    made = write_export(tmp_path / "in", tmp_path / "out", chosen)
    assert_same(tmp_path / "out", tmp_path / "in", made.plan)


@pytest.mark.parametrize("family", WITH_BIAS)
def test_what_stands_in_for_the_others_becomes_a_bias(tiny_checkpoints, neurons, tmp_path, family):
    made = write_export(tiny_checkpoints[family], tmp_path / "out", settings(neurons, **ALL))
    assert made.plan.settings.compensation == "mean"
    assert_same(tmp_path / "out", tiny_checkpoints[family], made.plan)


@pytest.mark.parametrize(
    ("model_type", "compensation"),
    [
        *(("llama", "mean"), ("granite", "mean"), ("nemotron", "mean"), ("gpt_neox", "mean")),
        *(("smollm3", "none"), ("arcee", "none"), ("qwen3", "none"), ("gemma2", "none"), ("phi3", "none")),
    ],
)
def test_to_a_gguf_file(tmp_path, model_type, compensation):
    """The file's logits are those of the partial load, here and in llama.cpp; a bias only where llama.cpp adds it."""
    vocabulary = byte_level_vocabulary() | {"tokenizer.ggml.pre": "qwen2"}
    rows = len(vocabulary["tokenizer.ggml.tokens"])
    write_tiny_gguf(tmp_path / "tokens.gguf", model=tiny_gguf_model("llama", vocab_size=rows), metadata=vocabulary)
    model = tiny_model(model_type, {**GRANTED.get(model_type, {}), "vocab_size": rows})
    model.save_pretrained(tmp_path / "in")
    gguf_tokenizer(tmp_path / "tokens.gguf").save_pretrained(tmp_path / "in")
    size, layers = 96, model.config.num_hidden_layers
    with_statistics(1, layers, size).save(tmp_path / "neurons.safetensors")
    chosen = settings(tmp_path / "neurons.safetensors", start_num=0, end_num=layers - 1)
    made = write_export(tmp_path / "in", tmp_path / "out.gguf", chosen)
    assert made.plan.settings.compensation == compensation
    dense = PartInferConfig(method="dense", dtype="float32", device="cpu", kernels="torch")
    with torch.inference_mode():
        expected = load_model(tmp_path / "in", made.plan.settings).model(input_ids=IDS).logits
        found = load_model(tmp_path / "out.gguf", dense).model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    if importlib.util.find_spec("llama_cpp") is not None:
        from tests.llama_cpp_model import LlamaCppModel

        judged = LlamaCppModel(tmp_path / "out.gguf").logits(IDS[0].tolist())
        assert (judged - expected[0]).abs().max() < 2e-3 * expected.abs().max()


def test_an_architecture_without_such_a_bias(tiny_checkpoints, neurons, tmp_path):
    with pytest.raises(PartInferError, match="no bias that could hold the compensation mean: use --compensation none"):
        write_export(tiny_checkpoints["qwen2"], tmp_path / "out", settings(neurons, **ALL, compensation="mean"))
    made = write_export(tiny_checkpoints["qwen2"], tmp_path / "out", settings(neurons, **ALL))
    assert made.plan.settings.compensation == "none"
    assert "nothing stands in for the neurons" in made.plan.notes[0]


def test_refitted_rows(tiny_checkpoints, neurons, tmp_path):
    path = tmp_path / "neurons.safetensors"
    path.write_bytes(neurons.read_bytes())
    made_up_fit(layers=range(LAYERS)).save(fit_path(path))
    made = write_export(tiny_checkpoints["llama"], tmp_path / "out", settings(path, **ALL))
    assert made.plan.settings.compensation == "refit"
    assert_same(tmp_path / "out", tiny_checkpoints["llama"], made.plan)


def test_sizes_are_of_the_type_that_is_written(tiny_checkpoints, neurons, tmp_path):
    full, half = (
        write_export(tiny_checkpoints["smollm2"], tmp_path / dtype, settings(neurons, **ALL, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    assert (full.bytes, full.bytes_dense) == (2 * half.bytes, 2 * half.bytes_dense)


def test_one_size_for_all_layers(tiny_checkpoints, neurons, tmp_path):
    """Two of six layers whole, 40 of 80 neurons in the others: 53 on average."""
    chosen = settings(neurons, start_num=1, end_num=4, loaded_neurons_percent=0.5)
    made = write_export(tiny_checkpoints["llama"], tmp_path / "out", chosen)
    assert made.plan.size == 64
    assert "64 of 80 neurons in each of the 6 layers, instead of 40 in layers 1 to 4" in made.plan.notes[0]
    assert_same(tmp_path / "out", tiny_checkpoints["llama"], made.plan)


def test_what_can_not_be_exported(tiny_checkpoints, neurons, tmp_path):
    llama, out = tiny_checkpoints["llama"], tmp_path / "out"
    with pytest.raises(PartInferError, match="load every neuron, so there is nothing to leave out"):
        write_export(llama, out, settings(neurons, **ALL, loaded_neurons_percent=1.0))
    with pytest.raises(PartInferError, match="writes floats, got --dtype int8"):
        write_export(llama, out, settings(neurons, **ALL, dtype="int8"))
    write_pack(llama, tmp_path / "pack", settings(neurons, **ALL))
    with pytest.raises(PartInferError, match="is a pack: give the model"):
        write_export(tmp_path / "pack", out, settings(neurons, **ALL))
    with pytest.raises(PartInferError, match="is there already"):
        write_export(llama, tmp_path / "pack", settings(neurons, **ALL))
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "experts")
    with pytest.raises(PartInferError, match="not all of its layers can be computed by neurons"):
        write_export(tmp_path / "experts", out, settings(neurons))
    assert not out.exists()


def test_the_command(tiny_checkpoints, neurons, tmp_path, capsys):
    """The folder has a tokenizer too, and the line says which settings give the same."""
    source, out = tmp_path / "in", tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(tiny_checkpoints["llama"]).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    flags = (
        f"--checkpoint_path {source} --dataset_neurons_filepath {neurons} --loaded_neurons_percent 0.7 --start_num 0"
    )
    command = ["--function", "export", "--output", str(out), *flags.split(), "--end_num", str(LAYERS - 1)]
    assert partinfer.main(command) == 0
    said = capsys.readouterr().err
    assert "56 neurons in each layer" in said
    assert "--loaded_neurons_percent 0.7" in said
    assert AutoTokenizer.from_pretrained(out)("a").input_ids == tiny_tokenizer()("a").input_ids
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 56 < INTERMEDIATE
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert len(modes) == 1, "the weights are as readable as the rest"


def test_from_a_gguf_file_to_a_folder_and_to_a_file(tmp_path):
    write_tiny_gguf(tmp_path / "in.gguf")
    NeuronFile(torch.stack([torch.randperm(96) for _ in range(2)]).int()).save(tmp_path / "neurons.safetensors")
    chosen = settings(tmp_path / "neurons.safetensors", start_num=0, end_num=1)
    for name in ("out", "out.gguf"):
        made = write_export(tmp_path / "in.gguf", tmp_path / name, chosen)
        assert made.plan.size == 67
    assert_same(tmp_path / "out", tmp_path / "in.gguf", made.plan)
    with torch.inference_mode():
        ours = [
            load_model(tmp_path / name, PartInferConfig(method="dense", dtype="float32"))
            for name in ("out", "out.gguf")
        ]
        first, second = (loaded.model(input_ids=IDS).logits for loaded in ours)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
