"""Models rounded layer by layer, the command, and the packs that are made of its file."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from partinfer import main as partinfer
from profiler.__main__ import main
from profiler.layerwise import LayerwiseModel, make_batches
from profiler.rounding.run import RoundingRun
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.kernels.formats import INT4, INT8
from transformers_patches.load.loader import load_model
from transformers_patches.weights.rounding import Rounding

GENERATOR = torch.Generator().manual_seed(3)
TEXTS = [torch.randint(3, 120, (length,), generator=GENERATOR).tolist() for length in (90, 70, 90, 40)]
ALL = {"use_partial_loading": True, "loaded_neurons_percent": 1.0, "sparsity": 1.0, "start_num": 0}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([TEXTS[0]]), use_cache=False).logits


@pytest.mark.parametrize("weight_format", [INT4, INT8], ids=lambda known: known.name)
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gemma3"])
def test_a_rounded_model_is_nearer_than_a_quantised_one(tiny_checkpoints, family, weight_format):
    plain, model = load(tiny_checkpoints[family]), load(tiny_checkpoints[family])
    run = RoundingRun(LayerwiseModel(model), make_batches(TEXTS, [0] * len(TEXTS), 2), weight_format)
    weights = run.run(quiet=True)
    floats = {name: values for name, values in plain.named_parameters() if name in weights}
    assert len(floats) == len(weights) > 3 * len(LayerwiseModel(plain).layers)
    expected = logits(plain)
    rounded = (logits(model) - expected).square().mean()
    for name, values in floats.items():
        packed = weights[name]
        ours = kernels.dequantize(packed)
        turned = packed.column_scales is not None
        assert torch.equal(model.get_parameter(name), ours.T if turned else ours)
        alone = kernels.quantize(
            values.data.T.contiguous() if turned else values.data, weight_format, None, packed.column_scales
        )
        values.data.copy_(kernels.dequantize(alone).T if turned else kernels.dequantize(alone))
    assert rounded < (logits(plain) - expected).square().mean()


@pytest.fixture(scope="module")
def rounding_file(model_folder, questions, tmp_path_factory):
    path = tmp_path_factory.mktemp("rounding") / "tiny.int4.safetensors"
    texts = ["--dataset", str(questions), "--task_type", "QA", "--max_new_tokens", "3", "--tokens", "300"]
    command = ["round", "--checkpoint_path", str(model_folder), *texts, "--output", str(path), "--device", "cpu"]
    report = path.with_suffix(".json")
    assert main([*command, "--quiet", "--json", str(report)]) == 0
    content = json.loads(report.read_text(encoding="utf-8"))
    assert (content["weights"], content["tokens"]) == (3 * 7, 300)
    assert main([*command, "--quiet"]) == 1  # it is there
    return path


def pack(model_folder, tmp_path, rounding, dtype="int4") -> int:
    command = ["--function", "pack", "--checkpoint_path", str(model_folder), "--dtype", dtype, "--start_num", "0"]
    command += [
        "--end_num",
        "2",
        "--loaded_neurons_percent",
        "1",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "pack"),
    ]
    return partinfer([*command, "--rounding", str(rounding)])


def test_a_pack_holds_what_was_rounded(model_folder, rounding_file, tmp_path):
    assert pack(model_folder, tmp_path, rounding_file) == 0
    held = Rounding.load(rounding_file)
    assert "300 tokens" in json.loads((tmp_path / "pack" / "pack.json").read_text(encoding="utf-8"))["rounded_for"]
    settings = PartInferConfig(**ALL, end_num=2, method="dense", compensation="none")
    loaded = load_model(tmp_path / "pack", settings)
    for number, layer in enumerate(loaded.state.layers):
        order = loaded.plan.layers[number].neurons
        for name in ("gate", "up", "down"):
            expected = held.weights[f"model.layers.{number}.mlp.{name}_proj.weight"][order]
            ours = layer.rows.weight(name)
            for one, other in zip(ours.parts, expected.parts, strict=True):
                assert torch.equal(one, other), name
    attention = loaded.model.model.layers[1].self_attn.o_proj.weight.packed
    assert torch.equal(attention.data, held.weights["model.layers.1.self_attn.o_proj.weight"].data)


def test_what_does_not_fit_is_refused(model_folder, rounding_file, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    held = Rounding.load(rounding_file)
    held.fingerprint = "0" * 16
    held.save(other)
    for file, dtype, message in (
        (rounding_file, "int8", "holds int4 values, got --dtype int8: give --dtype int4"),
        (other, "int4", "is for another model than tiny-llama"),
        (tmp_path / "none.safetensors", "int4", "no rounding file at"),
    ):
        with pytest.raises(PartInferError, match=message):
            pack(model_folder, tmp_path, file, dtype)
    with pytest.raises(SystemExit):
        partinfer(["--prompt", "hi", "--rounding", str(other)])
    assert "--rounding belongs to --function pack" in capsys.readouterr().err
    assert not (tmp_path / "pack").exists()
