"""Loading: plain transformers' logits from every layout and dtype, and errors for what does not fit."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.conftest import HIDDEN, INTERMEDIATE, LAYERS, random_neuron_file
from tests.transformers_patches.model_passes import DATASET, MODEL, padded_prompts, passes, run
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.fingerprint import fingerprint_of_model
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.machine import resolve_device
from transformers_patches.weights.model_files import read_config

TORCH = {"device": "cpu", "kernels": "torch"}
PASSES = passes(*padded_prompts([7, 3, 1], "left"), [1, 1, 2])


def sparse(folder, dtype: str = "float32", **settings):
    config = PartInferConfig(start_num=1, end_num=4, dtype=dtype, **TORCH, **settings)
    return load_model(folder, config, DATASET, MODEL)


def dense(folder, dtype: str = "auto"):
    return load_model(folder, PartInferConfig(method="dense", dtype=dtype, **TORCH))


def plain_model(folder, dtype: str = "auto"):
    """from_pretrained's model, its weights copied: in the mapped file they are not aligned, and MKL then rounds another
    way than in aligned memory, also between transformers and transformers."""
    return copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)).eval()


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dense_is_plain_transformers_bit_for_bit(checkpoint, dtype):
    ours = dense(checkpoint, dtype)
    plain = plain_model(checkpoint, dtype)
    assert ours.model.dtype == plain.dtype
    for passes_ in (PASSES, passes(*padded_prompts([6], "left"), [1, 1, 3])):
        for a, b in zip(run(ours.model, passes_), run(plain, passes_), strict=True):
            assert torch.equal(a, b)
    assert ours.plan.layers == {}
    assert not [p for p in ours.model.parameters() if p.requires_grad]
    assert not ours.model.training


def test_dense_generates_the_tokens_of_plain_transformers(checkpoint):
    plain = plain_model(checkpoint)
    input_ids, attention_mask = padded_prompts([7, 3, 1], "left")
    options = {"attention_mask": attention_mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(dense(checkpoint).model.generate(input_ids, **options), plain.generate(input_ids, **options))


def same_state(a, b) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("settings", [{}, {"method": "coreinfer"}])
def test_shards_are_one_checkpoint(checkpoint, tmp_path, settings):
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    single, sharded = sparse(checkpoint, **settings), sparse(tmp_path, **settings)
    assert same_state(single, sharded)
    assert sharded.report.bytes_read == single.report.bytes_read
    assert sharded.report.bytes_dense == single.report.bytes_dense


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_converted_from_any_dtype_to_any_other(checkpoint, tmp_path, dtype):
    target = getattr(torch, dtype)
    converted, full = sparse(checkpoint, dtype), sparse(checkpoint)
    assert {p.dtype for p in converted.model.parameters()} == {target}
    for name, weights in full.model.state_dict().items():
        assert torch.equal(converted.model.state_dict()[name], weights.to(target))

    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=target).save_pretrained(tmp_path)
    assert same_state(sparse(tmp_path, "auto"), converted)
    widened = sparse(tmp_path, "float32").model.state_dict()
    assert all(
        torch.equal(widened[name], weights.to(target).float()) for name, weights in full.model.state_dict().items()
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sparse_models_run_in_half_precision(checkpoint, dtype):
    full, half = run(sparse(checkpoint).model, PASSES), run(sparse(checkpoint, dtype).model, PASSES)
    for logits in half:
        assert logits.dtype == getattr(torch, dtype)
        assert torch.isfinite(logits).all()
    real = PASSES[0][1]["attention_mask"].bool()  # prefill computes the same neurons: only rounding is between them
    assert (half[0][real] - full[0][real]).abs().max() < 0.05 * full[0].abs().max()


def test_the_rows_of_a_sparse_layer_are_the_planned_neurons(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    loaded = sparse(checkpoint)
    opt = "model.decoder.layers.2.fc1.weight" in weights
    prefix = "model.decoder.layers.2." if opt else "model.layers.2.mlp."
    names = {"up": "fc1", "down": "fc2"} if opt else {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    module, neurons = loaded.state.layers[1], loaded.plan.layers[2].neurons
    for ours, theirs in names.items():
        stored = weights[f"{prefix}{theirs}.weight"]
        expected = stored.t()[neurons] if ours == "down" else stored[neurons]
        assert torch.equal(getattr(module.rows, ours), expected)
        bias = weights.get(f"{prefix}{theirs}.bias")
        if bias is not None:
            assert torch.equal(
                *(
                    (module.output_bias, bias)
                    if ours == "down"
                    else (getattr(module.rows, f"{ours}_bias"), bias[neurons])
                )
            )


def test_tied_embeddings_stay_one_tensor(tiny_checkpoints):
    for folder in (tiny_checkpoints["smollm2"], tiny_checkpoints["gemma3"], tiny_checkpoints["opt"]):
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        model = sparse(folder).model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model = sparse(tiny_checkpoints["llama"]).model
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def copy_with(folder, target, change) -> None:
    """A checkpoint whose tensors were changed by `change(weights)`."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_head_that_is_in_the_file_too_is_ignored(tiny_checkpoints, tmp_path):
    copy_with(
        tiny_checkpoints["smollm2"],
        tmp_path,
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
    )
    assert same_state(sparse(tmp_path), sparse(tiny_checkpoints["smollm2"]))


@pytest.mark.parametrize("family", ["smollm2", "opt"])
def test_files_of_a_bare_decoder_are_read(family, tiny_checkpoints, tmp_path):
    def remove_prefix(weights):
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    copy_with(tiny_checkpoints[family], tmp_path, remove_prefix)
    assert same_state(sparse(tmp_path), sparse(tiny_checkpoints[family]))


def test_the_report_counts_bytes(tiny_checkpoints):
    whole, partial = dense(tiny_checkpoints["llama"], "float32"), sparse(tiny_checkpoints["llama"])
    file_bytes = sum(w.numel() * 4 for w in load_file(tiny_checkpoints["llama"] / "model.safetensors").values())
    assert whole.report.bytes_dense == partial.report.bytes_dense == file_bytes
    assert whole.report.bytes_read == whole.report.bytes_resident == file_bytes
    unloaded = 4 * (INTERMEDIATE - 56) * HIDDEN * 4  # 4 layers, float32; of one matrix
    assert partial.report.bytes_resident == file_bytes - 3 * unloaded
    # columns of the down projection can't be skipped; the fingerprint reads two norms once more
    assert file_bytes - 2 * unloaded <= partial.report.bytes_read <= file_bytes - 2 * unloaded + 2 * HIDDEN * 4
    assert partial.report.seconds > 0


def test_generation_settings_of_the_folder_are_used(tiny_checkpoints, tmp_path):
    shutil.copytree(tiny_checkpoints["llama"], tmp_path, dirs_exist_ok=True)
    GenerationConfig(eos_token_id=[7, 9], pad_token_id=0).save_pretrained(tmp_path)
    assert sparse(tmp_path).model.generation_config.eos_token_id == [7, 9]


def set_shape(weights, name: str, *shape: int) -> None:
    weights[name] = torch.zeros(shape)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("model.layers.5.mlp.up_proj.weight"), "lacks model.layers.5.mlp.up_proj.weight"),
        (lambda w: w.pop("model.layers.2.mlp.up_proj.weight"), "lacks model.layers.2.mlp.up_proj.weight"),
        (lambda w: w.pop("model.layers.0.post_attention_layernorm.weight"), "lacks model.layers.0.post_attention_"),
        (lambda w: w.pop("lm_head.weight"), "lacks lm_head.weight"),
        (lambda w: w.update(extra=torch.zeros(2)), "has model.extra, which llama has no place for"),
        (
            lambda w: w.update({"model.layers.6.mlp.up_proj.weight": torch.zeros(2)}),
            "has model.layers.6.mlp.up_proj.weight, which llama has no place for",
        ),
        (
            lambda w: set_shape(w, "model.layers.2.mlp.gate_proj.weight", 81, HIDDEN),
            r"model.layers.2.mlp.gate_proj.weight has shape \(81, 32\), its config.json says \(80, 32\)",
        ),
        (
            lambda w: set_shape(w, "model.layers.2.mlp.down_proj.weight", HIDDEN, 90),
            r"down_proj.weight has shape \(32, 90\), its config.json says \(32, 80\)",
        ),
        (
            lambda w: set_shape(w, "model.layers.0.self_attn.q_proj.weight", HIDDEN, 31),
            r"q_proj.weight has shape \(32, 31\), its config.json says \(32, 32\)",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_their_config_are_an_error(tiny_checkpoints, tmp_path, change, message):
    copy_with(tiny_checkpoints["llama"], tmp_path, change)
    with pytest.raises(PartInferError, match=message):
        sparse(tmp_path)


def test_a_broken_neuron_file_is_found_before_weights_are_read(tiny_checkpoints, tmp_path):
    shutil.copytree(tiny_checkpoints["llama"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "neurons.json").write_text('{"neurons": [[0, 0]]}')
    settings = PartInferConfig(dataset_neurons_filepath=str(tmp_path / "neurons.json"), **TORCH)
    with pytest.raises(PartInferError, match="neurons.json: layer 0 is not a permutation"):
        load_model(tmp_path, settings)


def test_neuron_files_are_read_from_the_paths_in_the_settings(tiny_checkpoints, tmp_path):
    DATASET.save(tmp_path / "dataset.safetensors")
    MODEL.save(tmp_path / "model.json")
    settings = PartInferConfig(
        dataset_neurons_filepath=str(tmp_path / "dataset.safetensors"),
        model_neurons_filepath=str(tmp_path / "model.json"),
        start_num=1,
        end_num=4,
        dtype="float32",
        **TORCH,
    )
    assert same_state(load_model(tiny_checkpoints["llama"], settings), sparse(tiny_checkpoints["llama"]))


@pytest.mark.parametrize("layers, size", [(LAYERS + 1, INTERMEDIATE), (LAYERS, INTERMEDIATE + 1)])
def test_a_neuron_file_of_another_shape_names_both_sides(tiny_checkpoints, layers, size):
    neurons = random_neuron_file(1, layers, size)
    neurons.source = "other.json"
    with pytest.raises(PartInferError, match=f"other.json ranks {layers} layers of {size} .* llama has 6 layers of 80"):
        load_model(tiny_checkpoints["llama"], PartInferConfig(**TORCH), neurons)


@pytest.mark.parametrize("side", ["dataset_neurons", "model_neurons"])
def test_a_neuron_file_of_another_model_names_both_sides(tiny_checkpoints, side):
    theirs, ours = (
        fingerprint_of_model(AutoModelForCausalLM.from_pretrained(tiny_checkpoints[f])) for f in ("mistral", "llama")
    )
    wrong = NeuronFile(
        DATASET.ranking, metadata={"fingerprint": theirs, "model_name": "mistral"}, source="m.safetensors"
    )
    right = NeuronFile(DATASET.ranking, metadata={"fingerprint": ours})
    files = {"dataset_neurons": right, "model_neurons": right}
    load_model(tiny_checkpoints["llama"], PartInferConfig(**TORCH), **files)
    with pytest.raises(PartInferError) as raised:
        load_model(tiny_checkpoints["llama"], PartInferConfig(**TORCH), **{**files, side: wrong})
    assert all(part in str(raised.value) for part in ("m.safetensors", "mistral", theirs, "from llama", ours))


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"no model at .* \(config.json is missing\)"),
        ("", "config.json"),
        ('{"model_type": "llama"', "config.json"),
        ('{"hidden_size": 8}', "config.json"),
        ('{"model_type": "no-such-model"}', "no-such-model"),
        ('{"model_type": "gpt2"}', "unknown architecture 'gpt2': it has no list of decoder layers; known are gemma, "),
    ],
)
def test_a_folder_that_is_no_known_model_is_an_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(PartInferError, match=message) as raised:
        load_model(tmp_path, PartInferConfig(method="dense", **TORCH))
    assert "\n" not in str(raised.value)


def test_a_config_without_weights_is_an_error(tiny_checkpoints, tmp_path):
    shutil.copy(tiny_checkpoints["llama"] / "config.json", tmp_path)
    with pytest.raises(PartInferError, match="has no model.safetensors"):
        dense(tmp_path)


def test_the_config_is_read_without_the_weights(tiny_checkpoints, tmp_path):
    shutil.copy(tiny_checkpoints["opt"] / "config.json", tmp_path)
    assert read_config(tmp_path).to_dict()["ffn_dim"] == json.loads((tmp_path / "config.json").read_text())["ffn_dim"]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:x"])
def test_a_device_that_is_not_there_is_an_error(device):
    with pytest.raises(PartInferError, match=device):
        resolve_device(device)


def test_memory_limit_without_a_gpu_is_an_error(tiny_checkpoints):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(PartInferError, match="memory_limit moves active neurons to a GPU, but there is none"):
        load_model(tiny_checkpoints["llama"], PartInferConfig(memory_limit=True, start_num=1, end_num=4), DATASET)
