"""What a folder's files say against each other: transformers' own logits, or one clear error."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import HIDDEN, VOCABULARY, random_neuron_file
from tests.tiny_tokenizer import tiny_tokenizer
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.generation.generate import GenerationOptions, generate
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.weights.lookup import find_model
from transformers_patches.weights.model_files import load_tokenizer, open_weights, read_config

IDS = torch.arange(3, 40)[None]
TIED = ["smollm2", "gemma", "gemma3", "opt"]
HEAD = "lm_head.weight"


def logits(folder, dtype="float32", **settings):
    settings = {"method": "dense", "device": "cpu", "kernels": "torch", "dtype": dtype} | settings
    with torch.inference_mode():
        return load_model(folder, PartInferConfig(**settings)).model(input_ids=IDS).logits


def plain_logits(folder, dtype="float32"):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(input_ids=IDS).logits


def own_head(weights, embedding) -> None:
    generator = torch.Generator().manual_seed(5)
    weights[HEAD] = torch.randn(weights[embedding].shape, generator=generator) * 0.2


def same_head(weights, embedding) -> None:
    weights[HEAD] = weights[embedding].clone()


def only_head(weights, embedding) -> None:
    weights[HEAD] = weights.pop(embedding)


@pytest.fixture
def changed(tiny_checkpoints, tmp_path):
    """A folder whose weights were changed. Config values go on top."""

    def change(family, weights=None, **values):
        shutil.copytree(tiny_checkpoints[family], tmp_path, dirs_exist_ok=True)
        if weights is not None:
            stored = load_file(tmp_path / "model.safetensors")
            weights(stored, next(name for name in stored if name.endswith("embed_tokens.weight")))
            save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        config = {name: value for name, value in (config | values).items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return change


@pytest.mark.parametrize("change", [own_head, same_head, only_head])
@pytest.mark.parametrize("family", TIED)
def test_a_head_beside_a_tie_flag_is_what_transformers_makes_of_it(changed, family, change):
    folder = changed(family, change)
    assert torch.equal(logits(folder), plain_logits(folder))


def test_an_own_head_changes_the_logits(changed, tiny_checkpoints):
    folder = changed("smollm2", own_head)
    assert (logits(folder) - logits(tiny_checkpoints["smollm2"])).abs().max() > 0.1


@pytest.mark.parametrize("change", [own_head, only_head])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_packs_keep_such_heads(changed, tmp_path_factory, change, dtype):
    if dtype == "int8" and not kernels.available():
        pytest.skip(f"no native kernels: {kernels.why_not()}")
    folder = changed("smollm2", change)
    settings = {"method": "partinfer", "use_partial_loading": True, "start_num": 1, "end_num": 4, "dtype": dtype}
    pack = tmp_path_factory.mktemp("packs") / "pack"
    neurons = random_neuron_file(1)
    write_pack(folder, pack, PartInferConfig(device="cpu", **settings), neurons)
    with torch.inference_mode():
        ours, packed = (
            load_model(f, PartInferConfig(device="cpu", **settings), neurons).model(input_ids=IDS).logits
            for f in (folder, pack)
        )
    assert torch.equal(ours, packed)


def test_only_an_embedding_without_a_tie_flag_is_refused(changed):
    folder = changed("llama", lambda weights, _: weights.pop(HEAD))
    with pytest.raises(PartInferError, match=r"lacks lm_head.weight"):
        logits(folder)


@pytest.mark.parametrize("stale", ["other shards", "shards that are gone", "damaged index"])
def test_a_single_file_goes_before_shards_beside_it(changed, tiny_checkpoints, stale):
    folder = changed("llama")
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")}
    if stale == "other shards":
        zeros = {name: torch.zeros_like(values) for name, values in load_file(folder / "model.safetensors").items()}
        save_file(zeros, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text("{" if stale == "damaged index" else json.dumps(index))
    assert torch.equal(logits(folder), plain_logits(folder))
    assert torch.equal(logits(folder), logits(tiny_checkpoints["llama"]))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "absent"},
        {"dtype": None},
        {"dtype": "bfloat16"},
        {"dtype": "half"},
        {"dtype": "absent", "torch_dtype": "bfloat16"},
        {"dtype": "float16", "torch_dtype": "bfloat16"},
    ],
)
def test_the_type_is_what_transformers_makes_of_it(changed, stored, values):
    def convert(weights, _):
        weights.update({name: tensor.to(stored) for name, tensor in weights.items()})

    folder = changed("llama", convert, **values)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert read_config(folder).dtype == plain.dtype
    assert logits(folder, "auto").dtype == plain.dtype


REFUSED = [
    ({"dtype": "torch.bfloat16"}, 'dtype is "torch.bfloat16", expected one of float32, bfloat16, float16'),
    ({"torch_dtype": "bf16"}, 'torch_dtype is "bf16", expected one of'),
    ({"dtype": "int8"}, "dtype is .*expected one of"),
    ({"dtype": "nn"}, "dtype is .*expected one of"),
    ({"dtype": 5}, "dtype is 5, expected one of"),
    ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false", expected true or false, without quotes'),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
    ({"hidden_size": "32"}, 'hidden_size is "32", expected a whole number from 1'),
    ({"hidden_size": 32.0}, "hidden_size is 32.0, expected a whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers is true, expected a whole number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to 10000"),
    ({"num_hidden_layers": 9000}, "has 6 layers, its config.json says num_hidden_layers 9000"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, expected"),
    ({"num_attention_heads": 5}, "config.json can't be used: .*not a mu"),
    ({"num_key_value_heads": 3}, r"config.json|has shape"),
    ({"head_dim": 10**9}, "head_dim is 1000000000, expected"),
    ({"sliding_window": {}}, "sliding_window is {}, expected a whole number"),
    ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1, expected a number from 1e-06"),
    ({"vocab_size": 2**70}, "vocab_size is 1180591620717411303424, expected"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN, expected a finite number"),
    ({"rope_parameters": {"rope_theta": float("inf"), "rope_type": "default"}}, "rope_theta in it is not finite"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "foo"}}, "config.json can't be used, no llama model"),
    ({"hidden_act": "foo"}, "config.json can't be used, no llama model .*foo"),
    ({"return_dict": False}, "return_dict is false, but"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*without quantisation"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights is .*model.safetensors"),
    ({"id2label": 5}, "config.json can't be used"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_config_values_that_can_not_be_are_told(changed, values, message):
    folder = changed("llama", **values)
    with pytest.raises(PartInferError, match=message) as raised:
        logits(folder, "auto")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ("[1]", "expected an object, got list"),
        ('{"a": ' + "1" * 9999 + "}", "digit"),
    ],
)
def test_a_config_that_is_no_object_is_told(changed, text, message):
    folder = changed("llama")
    (folder / "config.json").write_text(text)
    with pytest.raises(PartInferError, match=f"config.json can't be read: .*{message}"):
        logits(folder)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF\x03\0\0\0", "model.safetensors is a GGUF file"),
        (b"PK\x03\x04" + bytes(50), "model.safetensors is PyTorch's .bin format: python download.py converts"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_a_file_of_another_kind_is_told_by_its_first_bytes(changed, start, message):
    folder = changed("llama")
    (folder / "model.safetensors").write_bytes(start)
    with pytest.raises(PartInferError, match=message):
        logits(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model.bin"])
def test_a_safetensors_file_alone_is_told_by_its_first_bytes(tiny_checkpoints, tmp_path, name):
    shutil.copy(tiny_checkpoints["llama"] / "model.safetensors", tmp_path / name)
    with pytest.raises(PartInferError, match="a safetensors file: give the folder that it lies in"):
        logits(find_model(tmp_path / name))


def test_a_tokenizer_of_another_model_is_refused(changed):
    folder = changed("llama", vocab_size=20)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(PartInferError, match="a tokenizer of .* tokens, but its config.json says vocab_size 20"):
        load_tokenizer(folder)


def test_tokens_that_only_the_tokenizer_has_are_refused_when_they_are_used(changed):
    folder = changed("llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(VOCABULARY)])
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, PartInferConfig(method="dense", device="cpu", kernels="torch"))
    options = GenerationOptions(max_new_tokens=2)
    assert generate(loaded, tokenizer, tokenizer("abc").input_ids, options).generated_tokens > 0
    with pytest.raises(
        PartInferError, match="the prompt has token 227, but the model has embeddings for tokens 0 to 127"
    ):
        generate(loaded, tokenizer, tokenizer(f"<extra{VOCABULARY - 1}>").input_ids, options)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "BPE"}}', '{"version": "1.0", "model": null}'])
def test_a_damaged_tokenizer_is_one_line(changed, text):
    folder = changed("llama")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(PartInferError, match="has no usable tokenizer") as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.input_layernorm.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_refused_with_their_name(changed, name, value, dtype):
    def put(weights, _):
        weights[name].view(-1)[HIDDEN - 1] = value

    folder = changed("llama", put)
    with pytest.raises(PartInferError, match=f"{name} has values that are not finite"):
        logits(folder, dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("ours", ["float32", "int8"])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.mlp.down_proj.weight"]
)
def test_integers_in_place_of_floats_are_refused_with_their_name(changed, name, dtype, ours):
    def put(weights, _):
        weights[name] = weights[name].to(dtype)

    folder = changed("llama", put)
    with pytest.raises(PartInferError, match=f"{name} holds {str(dtype)[6:]}, expected floats") as raised:
        logits(folder, ours)
    assert "\n" not in str(raised.value)


def test_integers_that_the_model_does_not_take_are_no_hindrance(changed):
    def put(weights, _):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4)

    assert torch.equal(logits(changed("llama", put)), logits(changed("llama")))


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(changed):
    folder = changed("llama")
    weights = open_weights(folder)
    name = sorted(weights.names())[0]
    out = torch.empty(weights.shape(name))
    weights.read_into(name, out)
    time.sleep(0.02)  # the clock of files is no finer
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(PartInferError, match="model.safetensors was changed while it was in use"):
        weights.read_into(name, out)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"[]", "config.json can't be read: expected an object, got list"),
        ("config.json", "{}".encode("utf-16"), "config.json can't be read: 'utf-8' codec"),
        ("config.json", b"\xef\xbb\xbf{}", "config.json can't be read: Unexpected UTF-8 BOM"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1", "tokenizer.json is a pointer of Git LFS"),
        ("tokenizer_config.json", b"<!DOCTYPE html>", "tokenizer_config.json is a web page"),
    ],
)
def test_errors_of_a_tokenizer_name_the_file_that_is_wrong(file, content, message, changed):
    folder = changed("llama")
    tiny_tokenizer().save_pretrained(folder)
    (folder / file).write_bytes(content)
    with pytest.raises(PartInferError, match=message):
        load_tokenizer(folder)
