"""GGUF files of the table's architectures: dense logits are those of transformers' model that they were made from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

from tests.conftest import random_neuron_file
from tests.model_gguf import FILES, write_model_gguf
from tests.model_table import LAYERS, LONG, SIZE, VARIANTS, YARN_ALONE, tiny_model
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.weights.gguf_architectures import REFUSED
from transformers_patches.weights.model_files import open_weights, read_config
from transformers_patches.weights.source import Source

IDS = torch.arange(3, 103)[None]  # longer than windows, and than what the tiny models with scaled positions began with
TORCH = {"device": "cpu", "kernels": "torch", "dtype": "float32"}
AS_FILES_HAVE_IT = {  # what files do not say
    "qwen2_moe": {"norm_topk_prob": False},
    "olmoe": {"norm_topk_prob": False},
    "starcoder2": {"sliding_window": 4096},
}
MINISTRAL = YARN_ALONE | {
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.4,
}
OLMO3_ROPE = {"full_attention": YARN_ALONE, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
CASES = {
    "granite, positions as they are": ("granite", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "olmo3, YaRN": ("olmo3", {"rope_parameters": OLMO3_ROPE}),
    "exaone4, no windows": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS}),
    "phi3, no windows": ("phi3", {"sliding_window": None}),
    "granitemoehybrid, experts": (
        "granitemoehybrid",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "position_embedding_type": "rope", "mamba_n_groups": 2},
    ),
    "falcon_h1, factors": (
        "falcon_h1",
        {
            "key_multiplier": 0.5,
            "attention_in_multiplier": 1.5,
            "attention_out_multiplier": 0.6,
            "ssm_in_multiplier": 0.7,
            "ssm_out_multiplier": 1.2,
            "ssm_multipliers": [0.5, 0.8, 1.1, 1.3, 0.9],
            "embedding_multiplier": 2.0,
            "lm_head_multiplier": 0.25,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_n_groups": 2,
        },
    ),
    "ministral3, far positions": ("ministral3", {"rope_parameters": MINISTRAL}),
    "granitemoe, biases": ("granitemoe", {"attention_bias": True}),
    **{name: VARIANTS[name] for name in ("nemotron, biases", "seed_oss, biases", "smollm3, biases")},
    **{name: VARIANTS[name] for name in ("gpt_neox, one after the other", "qwen3_moe, YaRN")},
    "phi3, LongRoPE": ("phi3", VARIANTS["phi3, LongRoPE"][1] | {"sliding_window": None}),
}
LONGROPE_FILE = {
    "metadata": {
        "phi3.rope.scaling.original_context_length": 64,
        "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(256 / 64) / math.log(64)),
    },
    "tensors": {
        "rope_factors_long.weight": torch.tensor(LONG["long_factor"]),
        "rope_factors_short.weight": torch.tensor(LONG["short_factor"]),
    },
}


def write_case(path: Path, name: str, more: dict | None = None) -> PreTrainedModel:
    """The file of a model_type or of one of CASES, with more options of its config; returns the model."""
    model_type, options = CASES.get(name, (name, {}))
    model = tiny_model(model_type, AS_FILES_HAVE_IT.get(model_type, {}) | options | (more or {}))
    write_model_gguf(path, model, **(LONGROPE_FILE if "LongRoPE" in name else {}))
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", [*FILES, *CASES])
def test_logits(name, tmp_path):
    model = write_case(tmp_path / "tiny.gguf", name)
    ours = load_model(tmp_path / "tiny.gguf", PartInferConfig(method="dense", **TORCH)).model
    assert ours.config.model_type == model.config.model_type
    expected = model(IDS).logits
    assert (ours(IDS).logits - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.why_not()}")
@pytest.mark.parametrize(
    ("model_type", "dtype"), [("granitemoe", "int4"), ("qwen2_moe", "bfloat16"), ("gpt_oss", "int8")]
)
def test_experts_are_read_as_from_a_folder(model_type, dtype, tmp_path):
    model = tiny_model(model_type, AS_FILES_HAVE_IT.get(model_type))
    write_model_gguf(tmp_path / "tiny.gguf", model)
    model.save_pretrained(tmp_path / "folder")
    settings = PartInferConfig(method="dense", device="cpu", kernels="native", dtype=dtype)
    file, folder = (load_model(tmp_path / name, settings) for name in ("tiny.gguf", "folder"))
    assert file.report.bytes_resident == folder.report.bytes_resident
    assert torch.equal(file.model(IDS).logits, folder.model(IDS).logits)


@pytest.mark.parametrize("model_type", ["phi3", "nemotron", "granitemoehybrid"])
def test_some_neurons_are_read_as_from_a_folder(model_type, tmp_path):
    model = tiny_model(model_type)
    write_model_gguf(tmp_path / "tiny.gguf", model)
    model.save_pretrained(tmp_path / "folder")
    settings = PartInferConfig(start_num=1, end_num=2, loaded_neurons_percent=0.5, **TORCH)
    ranking = random_neuron_file(1, layers=LAYERS, size=SIZE)
    file, folder = (load_model(tmp_path / name, settings, ranking) for name in ("tiny.gguf", "folder"))
    for a, b in zip(file.model.state_dict().values(), folder.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # norms of Nemotron have 1 added and taken away
    assert file.report.bytes_read < file.report.bytes_dense


def test_a_part_of_one_expert_costs_its_own_bytes(tmp_path):
    model = tiny_model("mixtral")
    write_model_gguf(tmp_path / "tiny.gguf", model)
    source, place = open_weights(tmp_path / "tiny.gguf"), "model.layers.2.mlp.experts"
    weights = model.state_dict()
    for name, values in (
        (f"{place}.gate_up_proj[{5 * SIZE}:{6 * SIZE}]", weights[f"{place}.gate_up_proj"].flatten(0, 1)[5 * SIZE :]),
        (f"{place}.down_proj[64:96]", weights[f"{place}.down_proj"][2]),
    ):
        out, before = torch.empty(source.shape(name)), source.bytes_read
        source.read_into(name, out)
        assert torch.equal(out, values[: len(out)])
        assert source.bytes_read - before == out.nbytes


@pytest.mark.parametrize(
    ("model_type", "metadata", "tensors", "message"),
    [
        ("granite", {"granite.rope.scaling.finetuned": False}, {}, "finetuned to False: only true can be computed"),
        ("qwen3_moe", {"qwen3moe.expert_gating_func": 2}, {}, "expert_gating_func to 2: only 1 can be computed"),
        ("qwen3_moe", {"qwen3moe.expert_weights_scale": 2.5}, {}, "expert_weights_scale, which is not understood"),
        ("qwen3_moe", {"qwen3moe.expert_count": 7}, {}, r"2 of 7 experts .* routers have the shapes \[\[6, 32\]\]"),
        ("qwen3_moe", {"qwen3moe.expert_used_count": 9}, {}, "9 of 6 experts for every token"),
        ("qwen3_moe", {"qwen3moe.expert_used_count": None}, {}, "has no qwen3moe.expert_used_count"),
        ("mixtral", {}, {"blk.1.ffn_up_exps.weight": None}, "gate_up_proj .* can't be put together"),
        ("mixtral", {}, {"blk.1.ffn_up_exps.weight": torch.zeros(6, 95, 32)}, "gate_up_proj .* put together"),
        (
            "mixtral",
            {},
            {"blk.0.ffn_gate.0.weight": torch.zeros(96, 32)},
            "blk.0.ffn_gate.0.weight, which mixtral has no",
        ),
        ("olmo2", {"olmo2.rope.dimension_count": 4}, {}, "rope.dimension_count to 4: only all 8 dimensions"),
        ("glm4", {"glm4.rope.dimension_count": 10}, {}, "rope.dimension_count to 10: only all 8 dimensions"),
        ("olmo2", {"olmo2.final_logit_softcapping": 30.0}, {}, "softcapping, which is not understood"),
        ("apertus", {"xielu.beta": [0.5]}, {}, "xielu.beta must be a list of 4 numbers"),
        (
            "granitemoehybrid",
            {},
            {"blk.1.ffn_up.weight": torch.zeros(95, 32)},
            "has blk.1.ffn_gate.weight, which|lacks",
        ),
        ("granitemoehybrid", {"granitehybrid.ssm.inner_size": 65}, {}, "8 heads in 65 channels of Mamba"),
        ("ministral3", {"mistral3.rope.scaling.yarn_log_multiplier": 0.5}, {}, "only 1.0 can be computed"),
        (
            "ministral3",
            {"mistral3.attention.temperature_scale": None},
            {},
            "has no mistral3.attention.temperature_scale",
        ),
        ("falcon_h1", {}, {"blk.0.ssm_a": torch.ones(8, 1)}, "blk.0.ssm_a has values that are not finite"),
        ("lfm2", {"lfm2.attention.head_count_kv": 2}, {}, "head_count_kv must be a list of 4 numbers"),
        ("lfm2", {"lfm2.attention.head_count_kv": [0, 2, 0, 1]}, {}, "head_count_kv must be a list of one number or 0"),
        ("olmo2", {"olmo2.expert_count": 4}, {}, "mixture of experts"),
        ("starcoder2", {}, {"blk.3.attn_output.bias": None}, "lacks model.layers.3.self_attn.o_proj.bias"),
        ("nemotron", {"nemotron.attention.layer_norm_epsilon": None}, {}, "has no nemotron.attention.layer_norm_eps"),
        ("phi3", {}, {"blk.0.attn_qkv.weight": torch.zeros(60, 32)}, "has shape .60, 32., its config.json says"),
    ],
)
def test_what_cannot_be_read_is_refused(model_type, metadata, tensors, message, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_model_gguf(path, tiny_model(model_type), metadata, tensors)
    with pytest.raises(PartInferError, match=message) as raised:
        load_model(path, PartInferConfig(method="dense", **TORCH))
    assert "\n" not in str(raised.value)


def test_experts_in_mxfp4(tmp_path):
    """As OpenAI's own files of gpt-oss have them."""
    model, place = tiny_model("gpt_oss"), "model.layers.1.mlp.experts"
    write_model_gguf(tmp_path / "plain.gguf", model)
    write_model_gguf(tmp_path / "tiny.gguf", model, packed={"_exps.weight": GGMLQuantizationType.MXFP4})
    source = open_weights(tmp_path / "tiny.gguf")
    values = model.state_dict()[f"{place}.gate_up_proj"][4].t().contiguous()  # [2 N, H]
    expected = dequantize(quantize(values.numpy(), GGMLQuantizationType.MXFP4), GGMLQuantizationType.MXFP4)
    out = torch.empty(32, 2 * SIZE)
    source.read_into(f"{place}.gate_up_proj[128:160]", out)
    assert torch.equal(out, torch.from_numpy(expected).t())
    chosen, columns = torch.tensor([7, 2, 190]), torch.empty(3, 32)
    before = source.bytes_read
    source.read_columns_into(Source(f"{place}.gate_up_proj[128:160]", "columns", chosen), columns)
    assert torch.equal(columns, out[:, chosen].t())
    assert source.bytes_read - before == 3 * 17  # three rows of 32 values: 4 bits each, and a byte
    ours = load_model(tmp_path / "tiny.gguf", PartInferConfig(method="dense", **TORCH)).model
    exact = load_model(tmp_path / "plain.gguf", PartInferConfig(method="dense", **TORCH)).model
    with torch.no_grad():
        assert 0 < (ours(IDS).logits - exact(IDS).logits).std() < 0.5 * exact(IDS).logits.std()


def test_layers_for_later_tokens_are_left_unread(tmp_path):
    """GLM-4.5's files have one more block than the model has layers."""
    model = tiny_model("glm4_moe")
    more = {"glm4moe.block_count": LAYERS + 1, "glm4moe.nextn_predict_layers": 1}
    block = {f"blk.{LAYERS}.{name}.weight": torch.ones(32) for name in ("attn_norm", "nextn.enorm")}
    write_model_gguf(tmp_path / "tiny.gguf", model, more, block)
    ours = load_model(tmp_path / "tiny.gguf", PartInferConfig(method="dense", **TORCH)).model
    with torch.no_grad():
        assert (ours(IDS).logits - model(IDS).logits).abs().max() < 1e-4
    write_model_gguf(tmp_path / "tiny.gguf", model, {"glm4moe.nextn_predict_layers": LAYERS})
    with pytest.raises(PartInferError, match="nextn_predict_layers must be an integer from 0 to 3"):
        read_config(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_would_be_read_wrongly_is_refused(architecture, tmp_path):
    write_model_gguf(tmp_path / "tiny.gguf", tiny_model("olmo2"), {"general.architecture": architecture})
    with pytest.raises(PartInferError, match=f"GGUF files of {architecture} can't be read: .*folder$"):
        read_config(tmp_path / "tiny.gguf")


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    write_model_gguf(tmp_path / "tiny.gguf", tiny_model("olmo2"), {"general.architecture": "mamba"})
    with pytest.raises(PartInferError, match="unknown GGUF architecture 'mamba'; known are .*gemma, .*qwen3moe, "):
        read_config(tmp_path / "tiny.gguf")
