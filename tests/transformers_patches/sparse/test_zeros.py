"""Rows of neurons that the model itself sets to 0 are not read: whatever they hold, nothing changes, in every format."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.model_table import LAYERS, SIZE, tiny_model
from tests.transformers_patches.model_passes import padded_prompts, passes, run
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.load.paths import FFN, layer_paths
from transformers_patches.modules.quantized import QuantizedWeight
from transformers_patches.sparse.cut_ffn import CutFFN
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.sparse.zeros_ffn import ZerosFFN
from transformers_patches.structure.activations import cutoff

ONE = passes(*padded_prompts([9], "left"), [1, 1, 1])
BIASES = {"mlp_bias": True, "attention_bias": True}
MODELS = {"nemotron": BIASES, "arcee": {}, "nanochat": {}, "gemma3n_text": {}}
FORMATS = ["float32", "bfloat16", "float16", "int8", "int4"]


@pytest.fixture
def load(native, tmp_path):
    def load_one(model_type: str, **settings) -> LoadedModel:
        if not (tmp_path / "config.json").exists():
            tiny_model(model_type, MODELS[model_type]).save_pretrained(tmp_path)
        options = {"method": "dense", "device": "cpu", "kernels": "native", **settings}
        return load_model(tmp_path, PartInferConfig(**options))

    return load_one


def ffns(loaded: LoadedModel) -> list[ZerosFFN | CutFFN]:
    return [module for module in loaded.model.modules() if isinstance(module, ZerosFFN | CutFFN)]


def activations(ffn: ZerosFFN | CutFFN, x: torch.Tensor) -> torch.Tensor:
    """h [N] of a token x [H] as PyTorch computes it, from the weights as the module has them."""
    rows = {name: ffn.rows.weight(name) for name in ffn.rows.row_names}
    first = kernels.project(x, rows["gate" if ffn.rows.gated else "up"], rows.get("up_bias"))
    if isinstance(ffn, CutFFN):
        return nn.functional.relu(first - cutoff(first, ffn.share))
    return nn.functional.relu(first)


def spoil(rows: NeuronRows, names: tuple[str, ...], neurons: torch.Tensor) -> None:
    """Make whatever is computed with these neurons' rows no number."""
    for name in names:
        held = getattr(rows, name)
        values = held.packed.scales if isinstance(held, QuantizedWeight) else held.data
        values[neurons] = torch.nan


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("model_type", MODELS)
def test_rows_of_zeros_are_not_read(load, model_type, dtype):
    loaded = load(model_type, dtype=dtype)
    found = ffns(loaded)
    assert len(found) == (2 if model_type == "gemma3n_text" else LAYERS)
    for ffn in found:
        x = torch.randn(1, 1, ffn.rows.hidden_size).to(loaded.run.dtype)
        before, h = ffn(x), activations(ffn, x.flatten())
        largest = float(h.max())
        certain = (h < -1).logical_or(h == 0)  # rounding of inputs in few bits moves the smallest over the bound
        near = activations_near(ffn, x, 0.05 * largest) if dtype in ("int8", "int4") else certain.new_zeros(len(h))
        zeros = (certain & ~near).nonzero().flatten()
        assert len(zeros) > SIZE // 5
        spoil(ffn.rows, ("up", "down") if isinstance(ffn, CutFFN) else ("down",), zeros)
        ffn.reset_counters()
        assert torch.equal(ffn(x), before)
        assert ffn.tokens == 1
        assert ffn.neurons <= SIZE - len(zeros)
        if dtype not in ("int8", "int4"):
            assert ffn.neurons == SIZE - len(zeros)


def activations_near(ffn: ZerosFFN | CutFFN, x: torch.Tensor, margin: float) -> torch.Tensor:
    """Which neurons are so near the bound that rounding the input may move them over it."""
    rows = {name: ffn.rows.weight(name) for name in ffn.rows.row_names}
    first = kernels.project(x.flatten(), rows["gate" if ffn.rows.gated else "up"], rows.get("up_bias"))
    bound = cutoff(first, ffn.share) if isinstance(ffn, CutFFN) else 0.0
    return (first - bound).abs() < margin


@pytest.mark.parametrize("model_type", MODELS)
def test_the_model_is_the_same_and_reads_less(load, model_type):
    ours, plain = load(model_type, dtype="float32"), load(model_type, dtype="float32", kernels="torch")
    first = layer_paths(ours.model, native=True)[0]
    assert first == FFN
    whole = ours.token_bytes()
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(run(ours.model, ONE), run(plain.model, ONE), strict=True))
    unread = sum(
        (SIZE - ffn.neurons / ffn.tokens) * ffn.rows.hidden_size * 4 * (2 if isinstance(ffn, CutFFN) else 1)
        for ffn in ffns(ours)
    )
    assert ours.token_bytes() == pytest.approx(whole - unread, abs=1)
    ours.reset_counters()
    assert ours.token_bytes() == whole


def test_sparse_layers_are_as_before(load, tmp_path):
    """Others beside them have their zeros left out; packs made with these modules can be read without them."""
    sparse = {"method": "partinfer", "selection": "up", "compensation": "none", "loaded_neurons_percent": 1.0}
    sparse |= {"start_num": 1, "end_num": 2, "dtype": "float32", "sparsity": 0.8}
    ours, plain = load("nemotron", **sparse), load("nemotron", **sparse, kernels="torch")
    assert len(ffns(ours)) == LAYERS - 2
    expected = run(plain.model, ONE)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(run(ours.model, ONE), expected, strict=True))
    options = {kernel: PartInferConfig(**sparse, device="cpu", kernels=kernel) for kernel in ("native", "torch")}
    for made in options:
        write_pack(tmp_path, tmp_path / made, options[made])
        for used in options:
            packed = load_model(tmp_path / made, options[used])
            assert all((a - b).abs().max() < 1e-4 for a, b in zip(run(packed.model, ONE), expected, strict=True))
