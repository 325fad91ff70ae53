"""Packs of int8 and int4 weights: bit for bit what quantising while loading gives, and no bigger than they have to be."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import partinfer
from tests.conftest import FAMILIES, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, make_tiny_checkpoint, random_neuron_file
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_tokenizer import tiny_tokenizer
from tests.transformers_patches.made_up_files import made_up_fit, with_input_squares, with_statistics
from tests.transformers_patches.model_passes import DATASET, MODEL, logits
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import INT4
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.modules.quantized import weight_places
from transformers_patches.neurons.fit_file import FitFile, fit_path
from transformers_patches.weights.model_files import load_tokenizer
from transformers_patches.weights.pack import Pack

DTYPES = ("int8", "int4")


def settings(**options) -> PartInferConfig:
    return PartInferConfig(**({"start_num": 1, "end_num": 4, "device": "cpu", "kernels": "torch"} | options))


@pytest.fixture(scope="module")
def packs(tiny_checkpoints, tmp_path_factory):
    """packs(family, dtype): made once."""
    root, made = tmp_path_factory.mktemp("packs"), {}

    def pack(family: str, dtype: str) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = root / f"{family}-{dtype}"
            write_pack(tiny_checkpoints[family], made[family, dtype], settings(dtype=dtype), DATASET, MODEL)
        return made[family, dtype]

    return pack


def assert_same(packed: LoadedModel, partial: LoadedModel) -> None:
    """Every weight is the same bit for bit, and so is what is computed."""
    ours, theirs = packed.model.state_dict(), partial.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(packed), logits(partial))
    assert packed.computed_fraction() == partial.computed_fraction()
    assert packed.report.bytes_resident == partial.report.bytes_resident
    assert packed.report.bytes_dense == partial.report.bytes_dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_is_the_model_quantized_while_loading(packs, tiny_checkpoints, family, dtype):
    folder = packs(family, dtype)
    packed = load_model(folder, settings())  # the pack's own type
    assert packed.settings.dtype == dtype
    assert_same(packed, load_model(tiny_checkpoints[family], settings(dtype=dtype), DATASET, MODEL))
    assert packed.report.bytes_read == pytest.approx(packed.report.bytes_resident, rel=0.1)  # and the plan
    fewer = {"loaded_neurons_percent": 0.5, "dtype": dtype}
    fewer_packed = load_model(folder, settings(**fewer))
    assert fewer_packed.plan.loaded_fraction == 0.5
    assert_same(fewer_packed, load_model(tiny_checkpoints[family], settings(**fewer), DATASET, MODEL))


def without_checksum(description: dict) -> dict:
    """As versions before 7 wrote it."""
    return {name: value for name, value in description.items() if name != "checksum"}


def test_packs_from_before_column_scales_have_none(packs, tmp_path):
    folder = shutil.copytree(packs("llama", "int8"), tmp_path / "old")
    index, description = folder / "model.safetensors.index.json", folder / "pack.json"
    content = json.loads(index.read_text())
    kept = {name: file for name, file in content["weight_map"].items() if not name.startswith("column_scales.")}
    assert len(kept) == len(content["weight_map"]) - 4
    index.write_text(json.dumps(content | {"weight_map": kept}))
    description.write_text(json.dumps(without_checksum(json.loads(description.read_text())) | {"version": 4}))
    old, new = (load_model(path, settings()) for path in (folder, packs("llama", "int8")))
    for before, after in zip(old.state.layers, new.state.layers, strict=True):
        assert torch.equal(before.rows.down.packed.data, after.rows.down.packed.data)
        assert torch.equal(before.rows.down.packed.column_scales, torch.ones(HIDDEN))
        assert not torch.equal(after.rows.down.packed.column_scales, torch.ones(HIDDEN))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packs_from_before_formats_had_names_tell_bits(packs, tmp_path, dtype):
    folder = shutil.copytree(packs("llama", dtype), tmp_path / "old")
    content, bits = json.loads((folder / "pack.json").read_text()), {"int8": 8, "int4": 4}
    renamed = 0
    for entry in content["packed"].values():
        if "format" in entry:
            entry["bits"] = bits[entry.pop("format")]
            renamed += 1
    assert renamed > 10
    (folder / "pack.json").write_text(json.dumps(without_checksum(content) | {"version": 5}))
    assert_same(load_model(folder, settings()), load_model(packs("llama", dtype), settings()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "smollm2"])
def test_the_size_on_disk_is_the_arithmetic(packs, tiny_checkpoints, family, dtype):
    bits, loaded = int(dtype.removeprefix("int")), round(0.7 * INTERMEDIATE)
    per_weight, per_embedding = bits / 8 + 2 / 32, 1 + 2 / 32
    attention = 3 * HIDDEN * HIDDEN  # two projections for queries, two of half the size
    expected = (LAYERS * attention + 4 * 3 * loaded * HIDDEN + 2 * 2 * INTERMEDIATE * HIDDEN) * per_weight
    expected += (1 if family == "smollm2" else 2) * VOCABULARY * HIDDEN * per_embedding
    expected += 4 * 4 * HIDDEN  # float32 column scales of down projections
    expected += 2 * ((2 * LAYERS + 1) * HIDDEN + 2 * INTERMEDIATE * HIDDEN)  # norms, and 80 columns are no groups
    plan = 4 * 4 * loaded
    made = json.loads((packs(family, dtype) / "pack.json").read_text())
    assert made["bytes"] == expected + plan
    assert made["dtype"] == dtype
    files = sum(path.stat().st_size for path in packs(family, dtype).glob("*.safetensors"))
    headers = 150 * len(made["packed"]) * 3 + 10_000
    assert made["bytes"] < files < made["bytes"] + headers


def save_files(folder: Path, *, as_product: bool = False) -> Path:
    neurons = with_statistics(1)
    neurons.save(folder / "neurons.safetensors")
    fit = made_up_fit()
    generator = torch.Generator().manual_seed(3)
    for layer in fit.layers.values() if as_product else ():
        layer.down = None
        layer.down_left = torch.randn(len(layer.neurons), 3, generator=generator) * 0.1
        layer.down_right = torch.randn(3, HIDDEN, generator=generator) * 0.1
    FitFile.save(fit, fit_path(folder / "neurons.safetensors"))
    return folder / "neurons.safetensors"


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
@pytest.mark.parametrize("as_product", [False, True], ids=["rows", "product"])
def test_rows_that_a_fit_changed_are_in_the_pack(tiny_checkpoints, tmp_path, dtype, as_product):
    path = save_files(tmp_path, as_product=as_product)
    fitted = {"dataset_neurons_filepath": str(path), "dtype": dtype}
    write_pack(tiny_checkpoints["llama"], tmp_path / "pack", settings(**fitted))
    partial = load_model(tiny_checkpoints["llama"], settings(**fitted))
    assert partial.settings.compensation == "refit"
    packed = load_model(tmp_path / "pack", settings())
    assert packed.settings.compensation == "refit"
    assert_same(packed, partial)
    if dtype == "bfloat16":
        return
    kept = FitFile.load(tmp_path / "pack" / "neurons" / "dataset_neurons.fit.safetensors")
    assert not any(layer.changes_rows for layer in kept.layers.values())
    for other in ({"compensation": "none"}, {"dataset_neurons_filepath": str(path)}):
        with pytest.raises(PartInferError, match="holds other neurons"):
            load_model(tmp_path / "pack", settings(**other))


def test_means_of_what_is_left_out_are_in_the_pack(tiny_checkpoints, tmp_path):
    neurons = with_statistics(2)
    write_pack(tiny_checkpoints["qwen2"], tmp_path / "pack", settings(dtype="int4"), neurons)
    packed = load_model(tmp_path / "pack", settings())
    assert packed.settings.compensation == "mean"
    assert_same(packed, load_model(tiny_checkpoints["qwen2"], settings(dtype="int4"), neurons))


@pytest.mark.parametrize("dtype", ["int4", "float32"])  # the checkpoint's own: nothing is rounded twice
def test_scales_that_know_the_inputs_are_in_the_pack(tiny_checkpoints, tmp_path, dtype):
    neurons = with_input_squares(3)
    options = {"dtype": "int4", "head_dtype": "int4"}
    packed_as = options if dtype == "int4" else {"dtype": dtype}
    write_pack(tiny_checkpoints["llama"], tmp_path / "pack", settings(**packed_as), neurons)
    partial = load_model(tiny_checkpoints["llama"], settings(**options), neurons)
    assert_same(load_model(tmp_path / "pack", settings(**options)), partial)  # the neuron file is inside
    ignorant = load_model(tiny_checkpoints["llama"], settings(**options), DATASET)
    assert not torch.equal(*(m.model.get_output_embeddings().weight.packed.scales for m in (partial, ignorant)))


def test_scales_that_know_the_inputs_of_a_gguf_file_are_in_the_pack(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf", "F32")
    options, neurons = settings(start_num=0, end_num=1, dtype="int4"), with_input_squares(3, 2, 64, 96)
    write_pack(tmp_path / "tiny.gguf", tmp_path / "pack", options, neurons)
    partial = load_model(tmp_path / "tiny.gguf", options, neurons)
    assert_same(load_model(tmp_path / "pack", settings(start_num=0, end_num=1)), partial)
    ignorant = load_model(tmp_path / "tiny.gguf", options, random_neuron_file(3, layers=2, size=96))
    scales = [loaded.model.model.layers[0].self_attn.q_proj.weight.packed.scales for loaded in (partial, ignorant)]
    assert not torch.equal(*scales)


@pytest.mark.parametrize("dtype", ["auto", *DTYPES])
@pytest.mark.parametrize("kind, factors", [("F32", True), ("Q8_0", False), ("Q4_0", True)])
def test_a_gguf_file_can_be_packed(tmp_path, kind, factors, dtype):
    factors = torch.linspace(1, 3, 8) if factors else None
    write_tiny_gguf(tmp_path / "tiny.gguf", kind, rope_factors=factors)
    options = settings(start_num=0, end_num=1, dtype=dtype)
    ranking = random_neuron_file(1, layers=2, size=96)
    write_pack(tmp_path / "tiny.gguf", tmp_path / "pack", options, ranking)
    packed = load_model(tmp_path / "pack", settings(start_num=0, end_num=1))
    assert_same(packed, load_model(tmp_path / "tiny.gguf", options, ranking))
    text = "two 12 words"
    expected = load_tokenizer(tmp_path / "tiny.gguf")(text)["input_ids"]
    assert load_tokenizer(tmp_path / "pack")(text)["input_ids"] == expected


@pytest.mark.parametrize("other", ["bfloat16", "float32", "int8"])
def test_another_type_is_an_error(packs, other):
    with pytest.raises(PartInferError, match=f"holds int4 weights, got --dtype {other}: leave it out, or pack"):
        load_model(packs("llama", "int4"), settings(dtype=other))


def test_a_pack_keeps_the_type_of_its_head(packs, tiny_checkpoints, tmp_path):
    options = settings(dtype="int4", head_dtype="int4")
    write_pack(tiny_checkpoints["llama"], tmp_path / "pack", options, DATASET, MODEL)
    partial = load_model(tiny_checkpoints["llama"], options, DATASET, MODEL)
    assert partial.model.get_output_embeddings().weight.packed.format is INT4
    assert_same(load_model(tmp_path / "pack", settings()), partial)
    for pack, held, asked in ((tmp_path / "pack", "int4", "int8"), (packs("llama", "int4"), "int8", "int4")):
        with pytest.raises(
            PartInferError, match=f"output projection in {held}, got --head_dtype {asked}: leave it out"
        ):
            load_model(pack, settings(head_dtype=asked))


@pytest.mark.parametrize("lost", ["data.", "scales."])
def test_missing_and_cut_off_parts_are_told(packs, tmp_path, lost):
    folder = tmp_path / "pack"
    shutil.copytree(packs("llama", "int8"), folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = f"{lost}model.layers.1.mlp.up_proj.weight"
    shard = folder / content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    with pytest.raises(PartInferError, match=f"lacks {name}: make the pack again"):
        load_model(folder, settings())
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(PartInferError, match="truncated"):
        load_model(folder, settings())


def test_floats_are_not_made_up(packs):
    pack = Pack(packs("llama", "int4"))
    with pytest.raises(PartInferError, match="holds model.layers.0.mlp.up_proj.weight in int4 only"):
        pack.read_into("model.layers.0.mlp.up_proj.weight", torch.empty(INTERMEDIATE, HIDDEN))


def test_nothing_is_left_of_a_pack_that_failed(tiny_checkpoints, tmp_path):
    with pytest.raises(PartInferError):
        write_pack(
            tiny_checkpoints["llama"], tmp_path / "pack", settings(dtype="int8"), random_neuron_file(1, layers=3)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_whole_layer_is_not_a_sparse_one(packs):
    with pytest.raises(PartInferError, match="holds other neurons"):
        load_model(packs("llama", "int8"), settings(start_num=2))


def test_packed_weights_have_their_own_memory(packs):
    """Nothing of the reading is kept: each weight's storage is as large as it is."""
    for _, place in weight_places(load_model(packs("llama", "int4"), settings()).model):
        for name in ("data", "scales"):
            values = getattr(place, name, None)
            if isinstance(values, torch.Tensor) and not isinstance(place, torch.nn.Parameter):
                assert values.untyped_storage().nbytes() == values.nbytes


def test_the_script_packs_quantized_weights_and_runs_them(tmp_path, capsys):
    source = make_tiny_checkpoint(tmp_path / "tiny", "llama")
    tiny_tokenizer().save_pretrained(source)
    DATASET.save(tmp_path / "neurons.safetensors")
    common = ["--cpu_only", "--json", "--start_num=1", "--end_num=3"]
    ranking = [f"--dataset_neurons_filepath={tmp_path / 'neurons.safetensors'}", "--dtype=int4"]
    run = ["--prompt", "what", "--num_tokens_to_generate", "5", "--no_chat_template", "--num_fewshot", "0"]
    made = ["--function", "pack", "--output", str(tmp_path / "pack")]
    assert partinfer.main([f"--checkpoint_path={source}", *common, *ranking, *made]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "int4"
    assert partinfer.main([f"--checkpoint_path={source}", *common, *ranking, *run]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert partinfer.main([f"--checkpoint_path={tmp_path / 'pack'}", "--cpu_only", "--json", *run]) == 0
    packed = json.loads(capsys.readouterr().out)
    for name in ("text", "loaded_neurons_percent", "computed_neurons_percent", "weight_bytes_resident"):
        assert packed[name] == expected[name]
