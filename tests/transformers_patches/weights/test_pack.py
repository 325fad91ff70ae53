"""Packs: the same model as a partial load of the checkpoint, read from front to back; settings that do not fit are told."""

import json
import os
import shutil

import pytest
import torch

import partinfer
from tests.conftest import FAMILIES
from tests.transformers_patches.model_passes import DATASET, MODEL, logits
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.weights.file_kinds import is_pack
from transformers_patches.weights.pack import Pack
from transformers_patches.weights.pack_description import pack_settings
from transformers_patches.weights.pack_schema import seal
from transformers_patches.weights.safetensors_folder import Checkpoint
from transformers_patches.weights.source import Source


def settings(**options) -> PartInferConfig:
    return PartInferConfig(**({"start_num": 1, "end_num": 4, "device": "cpu", "dtype": "float32"} | options))


@pytest.fixture(scope="module")
def packs(tiny_checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("packs")
    made = {}

    def pack(family: str):
        if family not in made:
            made[family] = root / family
            source = tiny_checkpoints[family]
            write_pack(source, made[family], settings(), dataset_neurons=DATASET, model_neurons=MODEL)
        return made[family]

    return pack


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_is_the_partially_loaded_model(packs, tiny_checkpoints, family):
    folder = packs(family)
    assert is_pack(folder)
    for options in ({}, {"method": "coreinfer", "use_partial_loading": True}, {"sparsity": 0.6}):
        packed = load_model(folder, settings(**options))
        partial = load_model(tiny_checkpoints[family], settings(**options), DATASET, MODEL)
        assert torch.equal(logits(packed), logits(partial))
        assert packed.computed_fraction() == partial.computed_fraction()
        assert packed.report.bytes_dense == partial.report.bytes_dense
        assert packed.report.bytes_resident == partial.report.bytes_resident
    weights = packed.report.bytes_resident
    assert weights <= packed.report.bytes_read < 1.1 * weights, "what is in memory is all that is read, and the plan"


def test_a_pack_in_another_type(packs):
    for dtype in ("bfloat16", "int8"):
        assert load_model(packs("llama"), settings(dtype=dtype)).model.dtype == torch.bfloat16


def test_neurons_are_stored_in_the_order_of_the_plan(packs, tiny_checkpoints):
    pack, checkpoint = Pack(packs("llama")), Checkpoint(tiny_checkpoints["llama"])
    plan = load_model(packs("llama"), settings()).plan
    neurons, name = plan.layers[1].neurons, "model.layers.1.mlp.down_proj.weight"
    whole = torch.empty(checkpoint.shape(name))
    checkpoint.read_into(name, whole)
    packed = torch.empty(len(neurons), whole.shape[0])
    pack.read_columns_into(Source(name, "columns", neurons), packed)
    assert torch.equal(packed, whole[:, neurons].t())
    assert pack.bytes_read == packed.nbytes + 4 * len(neurons)
    assert pack.shape(name) == checkpoint.shape(name)
    assert neurons[:24].tolist() == DATASET.ranking[1][:24].tolist()


def test_fewer_neurons_than_packed_are_a_prefix(packs, tiny_checkpoints):
    fewer = settings(loaded_neurons_percent=0.5)
    packed = load_model(packs("llama"), fewer)
    assert packed.plan.loaded_fraction == 0.5
    assert torch.equal(logits(packed), logits(load_model(tiny_checkpoints["llama"], fewer, DATASET, MODEL)))


def test_mean_compensation_and_choice_per_token_need_no_more(tiny_checkpoints, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shape = DATASET.ranking.shape
    statistics = {name: torch.rand(shape, generator=generator) for name in ("mean", "mean_sq", "down_norm")}
    statistics["mean_sq"] += statistics["mean"] ** 2
    known = NeuronFile(DATASET.ranking, statistics=statistics)
    write_pack(tiny_checkpoints["llama"], tmp_path / "pack", settings(), dataset_neurons=known)
    packed = load_model(tmp_path / "pack", settings())
    partial = load_model(tiny_checkpoints["llama"], settings(), known)
    assert packed.settings.compensation == partial.settings.compensation == "mean"
    assert torch.equal(logits(packed), logits(partial))
    other = NeuronFile(DATASET.ranking, statistics=known.statistics | {"mean": statistics["mean"] * 2})
    with pytest.raises(PartInferError, match="holds other neurons"):
        load_model(tmp_path / "pack", settings(), other)


@pytest.mark.parametrize("options", [{"method": "dense"}, {"method": "dense", "selection": "up"}, {"method": "coreinfer"}])
def test_methods_that_load_everything_take_a_pack_of_everything(tiny_checkpoints, tmp_path, options):
    ranks = {"dataset_neurons": DATASET, "model_neurons": MODEL}
    write_pack(tiny_checkpoints["llama"], tmp_path / "pack", settings(loaded_neurons_percent=1.0), **ranks)
    packed = load_model(tmp_path / "pack", settings(**options))
    assert packed.plan.loaded_fraction == 1
    same = {"dataset_neurons": DATASET} if options["method"] == "coreinfer" else {}
    whole = load_model(tiny_checkpoints["llama"], settings(**options), **same)
    torch.testing.assert_close(logits(packed), logits(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loaded_neurons_percent": 0.8}, "packed with --loaded_neurons_percent 0.7 --base_neurons_percent 0.3"),
        ({"base_neurons_percent": 0.2}, "holds other neurons"),
        ({"base_neurons_type": "model"}, "holds other neurons"),
        ({"start_num": 2}, "holds other neurons"),
        ({"method": "dense"}, "does not hold the model's own neurons, which method dense needs: it was packed with --load"),
    ],
)
def test_settings_that_need_other_neurons_are_told(packs, options, message):
    with pytest.raises(PartInferError, match=message):
        load_model(packs("llama"), settings(**options))


def test_what_can_not_be_packed_is_told(packs, tiny_checkpoints, tmp_path):
    source, files = tiny_checkpoints["llama"], {"dataset_neurons": DATASET, "model_neurons": MODEL}
    with pytest.raises(PartInferError, match="is a pack already"):
        write_pack(packs("llama"), tmp_path / "new", settings())
    with pytest.raises(PartInferError, match="is there already"):
        write_pack(source, tmp_path, settings(), **files)
    with pytest.raises(PartInferError, match="partial loading"):
        write_pack(source, tmp_path / "new", settings(method="dense"), **files)
    with pytest.raises(PartInferError, match="holds other neurons"):
        load_model(packs("llama"), settings(), MODEL, DATASET)
    assert list(tmp_path.iterdir()) == []


def test_damaged_packs_are_told(packs, tmp_path):
    folder = tmp_path / "pack"
    folder.mkdir()
    shutil.copytree(packs("llama"), folder, dirs_exist_ok=True)
    weights = (folder / "model-00001.safetensors").read_bytes()
    (folder / "model-00001.safetensors").write_bytes(weights[:-100])
    with pytest.raises(PartInferError, match="truncated"):
        load_model(folder, settings())
    (folder / "pack.json").write_text("{}", encoding="utf-8")
    with pytest.raises(PartInferError, match="can't be used"):
        load_model(folder, settings())


def test_a_changed_description_is_told(packs, tmp_path):
    folder = shutil.copytree(packs("llama"), tmp_path / "pack")
    content = json.loads((folder / "pack.json").read_text())

    def refused(changed: dict, message: str) -> None:
        (folder / "pack.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(PartInferError, match=message):
            load_model(folder, settings())

    refused(content | {"bytes": content["bytes"] + 1}, "it was changed after the pack was made; make the pack again")
    unsealed = {name: value for name, value in content.items() if name != "checksum"}
    refused(unsealed, "it was changed after")
    name, entry = next((n, e) for n, e in content["packed"].items() if e["how"] == "columns")
    for changes, message in (
        ({"shape": [entry["shape"][0], 2]}, "has 2 neurons"),
        ({"shape": [entry["shape"][0] + 1, entry["shape"][1]]}, "its tensors are not those of its pack.json"),
        ({"how": "rows"}, "its tensors are not those|neurons"),
        ({"neurons": 99}, "lacks neurons.99"),
        ({"neurons": None}, f"{name} has the neurons None"),
        ({"pair": {"first": name, "half": 0}}, f"one of the pair of {name} is missing"),
        ({"pair": {"first": name, "half": 2}}, f"{name} is half 2 of a pair"),
    ):
        packed = content["packed"] | {name: entry | changes}
        for sealed in (seal(content | {"packed": packed}), unsealed | {"packed": packed, "version": 6}):
            refused(sealed, message)
    (folder / "pack.json").write_text(json.dumps(unsealed | {"version": 6}), encoding="utf-8")
    assert torch.equal(logits(load_model(folder, settings())), logits(load_model(packs("llama"), settings())))


def test_a_pack_that_changes_while_it_is_read_is_told(packs, tmp_path):
    folder = shutil.copytree(packs("llama"), tmp_path / "pack")
    pack, name = Pack(folder), "model.norm.weight"
    out = torch.empty(pack.shape(name))
    pack.read_into(name, out)
    shard = folder / "model-00001.safetensors"
    os.utime(shard, ns=(0, 0))
    with pytest.raises(PartInferError, match=f"{shard} was changed while it was in use"):
        pack.read_into(name, out)


def test_the_script_packs_and_runs_packs(tiny_checkpoints, tmp_path, capsys):
    from tests.conftest import make_tiny_checkpoint
    from tests.tiny_tokenizer import tiny_tokenizer

    source = make_tiny_checkpoint(tmp_path / "tiny", "llama")
    tiny_tokenizer().save_pretrained(source)
    DATASET.save(tmp_path / "neurons.safetensors")
    common = ["--cpu_only", "--json"]
    ranking = [f"--dataset_neurons_filepath={tmp_path / 'neurons.safetensors'}", "--start_num=1", "--end_num=3"]
    fractions = ["--loaded_neurons_percent=0.5", "--base_neurons_percent=0.2", "--sparsity=0.3"]
    run = ["--prompt", "what", "--num_tokens_to_generate", "5", "--no_chat_template", "--num_fewshot", "0"]
    made = ["--function", "pack", "--output", str(tmp_path / "pack")]
    assert partinfer.main([f"--checkpoint_path={source}", *common, *ranking, *fractions, *made]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] > 0
    assert pack_settings(tmp_path / "pack")["end_num"] == 3
    assert partinfer.main([f"--checkpoint_path={source}", *common, *ranking, *fractions, *run]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert partinfer.main([f"--checkpoint_path={tmp_path / 'pack'}", *common, "--sparsity=0.3", *run]) == 0
    packed = json.loads(capsys.readouterr().out)
    for name in ("text", "loaded_neurons_percent", "computed_neurons_percent", "sparse_layers"):
        assert packed[name] == expected[name]


@pytest.mark.parametrize("flags", [["--function", "pack"], ["--output", "x"]])
def test_wrong_usage_ends_with_2(flags):
    with pytest.raises(SystemExit) as ended:
        partinfer.main(flags)
    assert ended.value.code == 2
