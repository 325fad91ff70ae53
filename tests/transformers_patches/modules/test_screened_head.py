"""The output projection in planes: decoding computes exactly the logits that matter, everything else all of them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation import LogitsProcessorList

from evaluation.weights import weight_counts
from tests.conftest import FAMILY_CONFIGS, HIDDEN, random_neuron_file
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.generation.decoding_loop import NUCLEUS_TOLERANCE, _needed
from transformers_patches.generation.generate import generate_ids
from transformers_patches.kernels import SOFTMAX, Needed
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.modules.fast_linear import FastLinear
from transformers_patches.modules.quantized import QuantizedLinear, QuantizedWeight
from transformers_patches.modules.screened_head import ScreenedHead

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.why_not()}")
NEURONS = random_neuron_file(1)


def settings(**options) -> PartInferConfig:
    return PartInferConfig(**({"start_num": 1, "end_num": 4, "device": "cpu", "dtype": "int8"} | options))


def load(folder, **options):
    return load_model(folder, settings(**options), NEURONS)


def many_tokens(folder):
    """A checkpoint with a vocabulary that is worth screening, and logits as those of a trained model are spread."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(FAMILY_CONFIGS["llama"][1] | {"vocab_size": 3000}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.lm_head.weight.data.mul_(3 / (HIDDEN**0.5 * model.lm_head.weight.std()))
    model.save_pretrained(folder)
    return folder


def head_of(rows: int = 3000) -> tuple[ScreenedHead, torch.Tensor, torch.Tensor]:
    """(head, hidden states [4, 1, H], their exact logits); logits have a standard deviation of 3."""
    generator = torch.Generator().manual_seed(0)
    packed = kernels.quantize(torch.randn(rows, HIDDEN, generator=generator), kernels.INT8)
    weight = QuantizedWeight(rows, HIDDEN, kernels.INT8, in_planes=True)
    weight.fill(kernels.split_planes(packed))
    hidden = torch.randn(4, 1, HIDDEN, generator=generator) * (3 / HIDDEN**0.5)
    return ScreenedHead(QuantizedLinear(weight, None, native=True), None), hidden, kernels.linear(hidden, packed)


def test_a_token_of_each_sequence_is_screened_and_counted():
    head, hidden, exact = head_of()
    logits = head(hidden)
    p, q = exact.log_softmax(-1), logits.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).max() < 2 * SOFTMAX.tolerance
    assert torch.equal(logits.argmax(-1), exact.argmax(-1))
    assert head.tokens == 4
    assert 4 < head.exact < 4 * 3000
    plane = 3000 * HIDDEN / 2
    assert head.unread_bytes() == pytest.approx(plane * (1 - head.exact / 12000))
    head.reset_counters()
    assert head.unread_bytes() == 0


@pytest.mark.parametrize("shape", [(1, 4, HIDDEN), (4, HIDDEN), (2, 2, HIDDEN)])
def test_more_positions_of_a_sequence_are_exact(shape):
    head, hidden, _ = head_of()
    x = hidden.view(shape)
    assert torch.equal(head(x), kernels.project(x, head.packed))
    assert head.tokens == 0


def test_many_sequences_are_exact():
    head, hidden, _ = head_of()
    x = hidden.repeat(9, 1, 1)
    assert torch.equal(head(x), kernels.project(x, head.packed))


def test_the_screen_follows_the_weight():
    head, _, _ = head_of()
    before = head.screen
    assert head.screen is before
    other = kernels.quantize(torch.randn(3000, HIDDEN) * 5, kernels.INT8)
    head.weight.fill(kernels.split_planes(other))
    assert (head.screen.errors > 10 * before.errors).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "smollm2", "gemma3", "opt"])  # own head, and tied ones
def test_models_have_such_a_head_with_native_kernels(tiny_checkpoints, family, dtype):
    ours, plain = (load(tiny_checkpoints[family], dtype=dtype, kernels=name) for name in ("native", "torch"))
    head, other = ours.model.get_output_embeddings(), plain.model.get_output_embeddings()
    assert isinstance(head, ScreenedHead)
    assert type(other) is QuantizedLinear
    assert torch.equal(kernels.join_planes(head.weight.packed).data, other.weight.packed.data)
    assert torch.equal(head.weight.packed.scales, other.weight.packed.scales)
    ids = torch.tensor([[3, 7, 100]])
    embeddings = [loaded.model.get_input_embeddings()(ids) for loaded in (ours, plain)]
    assert torch.equal(*embeddings)
    assert ours.report.bytes_resident == plain.report.bytes_resident


@pytest.mark.parametrize(
    "options, kind",
    [
        ({"dtype": "int4", "head_dtype": "int4", "screen_head": "on"}, QuantizedLinear),
        ({"dtype": "int8", "screen_head": "off"}, QuantizedLinear),
        ({"dtype": "bfloat16"}, FastLinear),
    ],
)
def test_other_heads_are_read_whole(tiny_checkpoints, options, kind):
    loaded = load(tiny_checkpoints["llama"], **options)
    assert type(loaded.model.get_output_embeddings()) is kind
    ids = loaded.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, pad_token_id=0)
    assert ids.shape == (1, 6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["llama", "smollm2", "gemma3"])
def test_float_heads_are_screened_if_told(tiny_checkpoints, family, dtype):
    options = {"dtype": dtype, "kernels": "native"}
    ours, plain = (load(tiny_checkpoints[family], screen_head=name, **options) for name in ("on", "auto"))
    head, other = ours.model.get_output_embeddings(), plain.model.get_output_embeddings()
    assert isinstance(head, ScreenedHead)
    assert torch.equal(head.weight, other.weight)
    tied = ours.model.config.tie_word_embeddings
    assert (head.weight is ours.model.get_input_embeddings().weight) == tied
    rows, columns = head.weight.shape
    assert head.high.nbytes == rows * columns // 2 + rows * columns // 32 * 2
    assert ours.report.bytes_resident == plain.report.bytes_resident + head.high.nbytes
    prompt = torch.tensor([[3, 7, 100]])
    assert torch.equal(ours.model(prompt).logits, plain.model(prompt).logits)
    hidden = torch.randn(1, 1, columns).to(head.weight.dtype)
    assert head(hidden).argmax() == kernels.linear(hidden, other.weight).argmax()


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_bytes_of_a_token_are_those_that_were_read(tmp_path, dtype):
    loaded = load(many_tokens(tmp_path / "model"), dtype=dtype, screen_head="on")
    everything = weight_counts(loaded)["token_bytes"]
    config = GenerationConfig(max_new_tokens=6, pad_token_id=0, eos_token_id=None)
    loaded.reset_counters()
    generate_ids(loaded, torch.tensor([[5, 6, 7]]), config, None)
    head = loaded.model.get_output_embeddings()
    assert head.tokens == 6
    refining = 3000 * HIDDEN * (0.5 if dtype == "int8" else 2)
    neurons = sum(layer.rows.row_bytes for layer in loaded.state.layers) * (1 - loaded.bytes_fraction() / 0.7)
    read = weight_counts(loaded)["token_bytes"]
    assert read == pytest.approx(everything - neurons - refining * (1 - head.exact / (6 * 3000)), abs=2)
    loaded.reset_counters()
    assert head.tokens == head.exact == 0


@pytest.mark.parametrize("family", ["llama", "smollm2"])
@pytest.mark.parametrize("packed_with, read_with", [("native", "torch"), ("torch", "native"), ("native", "native")])
def test_packs_hold_either_layout(tiny_checkpoints, tmp_path, family, packed_with, read_with):
    write_pack(tiny_checkpoints[family], tmp_path / "pack", settings(kernels=packed_with), NEURONS)
    packed = load_model(tmp_path / "pack", settings(dtype="auto", kernels=read_with))
    expected = load(tiny_checkpoints[family], kernels=read_with)
    ours, theirs = packed.model.state_dict(), expected.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert isinstance(packed.model.get_output_embeddings(), ScreenedHead) == (read_with == "native")


def needed(**options) -> Needed:
    config = GenerationConfig(**options)
    processors = LogitsProcessorList()
    if options:
        tiny = LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=99
        )
        model = AutoModelForCausalLM.from_config(tiny)
        processors = model._get_logits_processor(config, input_ids_seq_length=3)
    return _needed(config, processors)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, Needed(largest=1)),
        ({"repetition_penalty": 1.2}, SOFTMAX),
        ({"do_sample": True, "top_k": 0, "temperature": 0.7}, Needed(temperature=0.7)),
        ({"do_sample": True, "top_k": 40, "temperature": 0.7}, Needed(largest=40)),
        ({"do_sample": True, "top_k": 0, "top_p": 0.9}, Needed(tolerance=NUCLEUS_TOLERANCE)),
        (
            {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 2.0},
            Needed(tolerance=NUCLEUS_TOLERANCE, temperature=2.0),
        ),
        ({"do_sample": True, "top_k": 40, "repetition_penalty": 1.2}, SOFTMAX),
        ({"do_sample": True, "repetition_penalty": 1.2, "temperature": 1.5}, Needed(temperature=1.5)),
        ({"do_sample": True, "top_k": 0}, SOFTMAX),
    ],
    ids=str,
)
def test_what_a_choice_of_tokens_needs(options, expected):
    assert needed(**options) == expected


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_greedy_tokens_are_those_of_a_head_that_is_read_whole(tmp_path, dtype):
    folder = many_tokens(tmp_path / "model")
    loaded, plain = (load(folder, dtype=dtype, screen_head=name) for name in ("on", "off"))
    head = loaded.model.get_output_embeddings()
    config = GenerationConfig(max_new_tokens=20, pad_token_id=0, eos_token_id=None)
    ours = generate_ids(loaded, torch.tensor([[5, 6, 7]]), config, None)
    assert head.exact < 20 * 3000
    assert torch.equal(ours, generate_ids(plain, torch.tensor([[5, 6, 7]]), config, None))
