"""int8 and int4 in whole models: equal to masked plain transformers with the dequantised weights, and counted exactly."""

from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import FAMILIES, FAMILY_CONFIGS, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY
from tests.transformers_patches.masked_reference import DOWN_PROJECTION, MaskedReference, naive_count
from tests.transformers_patches.model_passes import (
    DATASET,
    METHODS,
    MODEL,
    SPARSE,
    assert_equal_where_real,
    computed_rows,
    naive,
    padded_prompts,
    passes,
    run,
    run_reference,
    selection_of,
)
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model
from transformers_patches.modules.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedWeight

LENGTHS = {"one sequence": [7], "left": [7, 3, 1], "right": [5, 9, 2], "one token": [1]}
BITS = {"int8": 8, "int4": 4}


def load(folder, dtype: str, method: str = "partinfer", kernels: str = "torch", **settings) -> LoadedModel:
    config = PartInferConfig(
        **METHODS[method], **settings, start_num=1, end_num=4, dtype=dtype, device="cpu", kernels=kernels
    )
    return load_model(folder, config, DATASET, MODEL)


def restored(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return kernels.dequantize(kernels.quantize(weight, kernels.format_named(f"int{bits}")))


def restored_down(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A down projection [H, N] of a sparse layer: neuron by neuron, groups along H, outputs relative to their largest weight."""
    scales = weight.abs().amax(dim=1) / 64
    return restored((weight / scales[:, None]).t().contiguous(), bits).t() * scales[:, None]


@pytest.fixture(scope="session")
def dequantized(tiny_checkpoints, tmp_path_factory):
    """dequantized(family, dtype): a reference of plain transformers with the weights that ours stand for, in float32."""

    @cache
    def make(family: str, dtype: str) -> MaskedReference:
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints[family], dtype=torch.float32)
        original = {name: parameter.clone() for name, parameter in model.named_parameters()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                match, weight = DOWN_PROJECTION.search(name), module.weight.data
                if match and int(match[1]) in SPARSE:
                    module.weight.data = restored_down(weight, BITS[dtype])
                elif weight.shape[1] % kernels.GROUP == 0:
                    module.weight.data = restored(weight, BITS[dtype])
        for weight in {embedding.weight, head.weight}:
            weight.data = restored(weight.data, 8)
        for name, parameter in model.named_parameters():
            if torch.equal(parameter, original[name]):  # not quantised
                parameter.data = parameter.data.bfloat16().float()
        folder = tmp_path_factory.mktemp(f"{family}-{dtype}")
        model.save_pretrained(folder)
        return MaskedReference(folder)

    return make


@pytest.fixture(scope="session")
def quantized(tiny_checkpoints):
    """quantized(family, dtype, method, **settings): PyTorch path, the floats between the weights widened to float32."""

    @cache
    def make(family: str, dtype: str, method: str, **settings) -> LoadedModel:
        ours = load(tiny_checkpoints[family], dtype, method, **settings)
        ours.model.float()
        return ours

    return make


CASES = [
    *[(family, "partinfer", "left") for family in FAMILIES],
    *[("llama", method, "left") for method in METHODS if method != "partinfer"],
    *[(family, "partinfer", padding) for family in ("llama", "opt") for padding in LENGTHS if padding != "left"],
]


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("family, method, padding", CASES)
def test_equals_the_masked_model_with_dequantized_weights(family, method, padding, dtype, quantized, dequantized):
    input_ids, attention_mask = padded_prompts(LENGTHS[padding], padding)
    formula = naive(method)
    all_passes = passes(input_ids, attention_mask, [1, 1, 3])
    expected = run_reference(dequantized(family, dtype), formula, all_passes)
    ours = quantized(family, dtype, method)
    assert_equal_where_real(run(ours.model, all_passes), expected, attention_mask)
    for layer in SPARSE:
        assert selection_of(ours, layer, len(input_ids)) == formula.selected[layer]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_quantizing_makes_a_difference(family, references, dequantized):
    """The comparison above can fail: the weights are not those of the checkpoint, and 4 bits are not 8."""
    all_passes = passes(*padded_prompts([7], "left"), [1])
    logits = [
        run_reference(reference, naive("dense+partial"), all_passes)[0]
        for reference in (references(family), dequantized(family, "int8"), dequantized(family, "int4"))
    ]
    eight, four = ((other - logits[0]).abs().max() for other in logits[1:])
    assert 1e-3 < eight < four / 4


@pytest.mark.parametrize("family", ["llama-mlp-bias", "gemma3", "opt"])
@pytest.mark.parametrize("dtype", BITS)
def test_native_kernels_give_the_logits_of_the_torch_path(native, family, dtype, tiny_checkpoints):
    """Activations are rounded to 8 bits in the kernels: close, not equal. What is computed is the same."""
    all_passes = passes(*padded_prompts([7, 3, 1], "left"), [1, 1, 2])
    fast, plain = (load(tiny_checkpoints[family], dtype, "dense+partial", kernels=k) for k in ("native", "torch"))
    assert any(module.native for module in fast.model.modules() if isinstance(module, QuantizedLinear))
    for number, (a, b) in enumerate(zip(run(fast.model, all_passes), run(plain.model, all_passes), strict=True)):
        real = all_passes[0][1]["attention_mask"].bool() if number == 0 else slice(None)
        assert (a - b).float()[real].norm() < 0.12 * b.float()[real].norm()


@pytest.mark.parametrize(
    "fast_products, dtype, few, few_rows",
    [(1, "int8", 32, 8), (1, "int4", 32, 8), (0, "int8", 48, 48), (0, "int4", 128, 48)],
)
def test_short_prompts_meet_packed_rows(native, fast_products, dtype, few, few_rows, tiny_checkpoints, monkeypatch):
    """In whole and in sparse layers alike; only for long prompts are the rows turned into floats."""
    monkeypatch.setattr(kernels, "multiplies_fast", lambda dtype: fast_products)
    ours = load(tiny_checkpoints["llama"], dtype, kernels="native")
    unpacked, summed, project, combine = [], [], kernels.project, kernels.combine
    monkeypatch.setattr(kernels, "project", lambda x, *weight: unpacked.append(x.shape[-1]) or project(x, *weight))
    monkeypatch.setattr(kernels, "combine", lambda h, weight: summed.append(len(weight)) or combine(h, weight))
    for tokens in (1, few_rows, few_rows + 1, few, few + 1):
        unpacked.clear()
        summed.clear()
        with torch.inference_mode():
            ours.model(torch.arange(tokens)[None] % VOCABULARY, use_cache=True, logits_to_keep=1)
        assert unpacked.count(HIDDEN) == (LAYERS * 6 if tokens > few else 0)  # q, k, v, o, gate and up
        assert summed == ([56] * len(SPARSE) if tokens > few_rows else [])  # down


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_exactly_the_planned_neurons_are_computed(family, dtype, quantized):
    ours = quantized(family, dtype, "partinfer", sparsity=0.35)
    ours.reset_counters()
    prefill, *decode = computed_rows(ours, passes(*padded_prompts([7, 3, 1], "left"), [1, 1, 3]))
    assert prefill == dict.fromkeys(SPARSE, 56)
    assert decode == [dict.fromkeys(SPARSE, naive_count(0.35, INTERMEDIATE))] * 3
    assert ours.computed_fraction() == pytest.approx(28 / INTERMEDIATE)


@pytest.mark.parametrize("dtype", BITS)
def test_native_kernels_count_the_planned_neurons(native, dtype, tiny_checkpoints):
    ours = load(tiny_checkpoints["llama"], dtype, sparsity=0.35, kernels="native")
    run(ours.model, passes(*padded_prompts([7, 3, 1], "left"), [1, 1, 3]))
    assert {layer.counters.neurons for layer in ours.state.layers} == {15 * 28}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("family", ["llama", "smollm2"])
def test_bytes_in_memory_are_data_and_scales(family, dtype, tiny_checkpoints):
    def packed(rows: int, columns: int, bits: int) -> int:
        return rows * (columns * bits // 8 + columns // 32 * 2)

    bits, kept = BITS[dtype], naive_count(0.7, INTERMEDIATE)
    attention = 2 * packed(HIDDEN, HIDDEN, bits) + 2 * packed(HIDDEN // 2, HIDDEN, bits)
    sparse = 3 * packed(kept, HIDDEN, bits) + HIDDEN * 4  # float32 column scales of down
    whole = 2 * packed(INTERMEDIATE, HIDDEN, bits) + INTERMEDIATE * HIDDEN * 2  # 80 columns are no groups: bfloat16
    norms = (2 * LAYERS + 1) * HIDDEN * 2
    vocabulary = packed(VOCABULARY, HIDDEN, 8) * (1 if FAMILY_CONFIGS[family][1].get("tie_word_embeddings") else 2)
    ours = load(tiny_checkpoints[family], dtype)
    assert ours.report.bytes_resident == LAYERS * attention + 4 * sparse + 2 * whole + norms + vocabulary
    assert [layer.rows.row_bytes for layer in ours.state.layers] == [sparse] * 4


def test_what_is_quantized(checkpoint):
    model = load(checkpoint, "int4").model
    assert not [name for name, module in model.named_modules() if type(module) is torch.nn.Embedding]
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert all(module.in_features == INTERMEDIATE for module in linears)
    assert model.dtype == torch.bfloat16
    scales = {name: buffer.dtype for name, buffer in model.named_buffers() if name.endswith(".scales")}
    assert set(scales.values()) == {torch.float16}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert embedding.weight.packed.format is head.weight.packed.format is kernels.INT8
    assert (embedding.weight is head.weight) == model.config.tie_word_embeddings
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_the_head_has_4_bits_if_told(tiny_checkpoints):
    for family in ("llama", "opt"):  # tied and not
        whole, ours = (load(tiny_checkpoints[family], "int4", head_dtype=name) for name in ("auto", "int4"))
        embedding, head = ours.model.get_input_embeddings(), ours.model.get_output_embeddings()
        assert embedding.weight.packed.format is head.weight.packed.format is kernels.INT4
        saved = (embedding.weight.data.nbytes * 2 - embedding.weight.data.nbytes) * len({embedding.weight, head.weight})
        assert whole.report.bytes_resident - ours.report.bytes_resident == saved
        exact = kernels.dequantize(head.weight.packed)
        values = torch.randn(1, HIDDEN).bfloat16()
        close = torch.nn.functional.cosine_similarity(head(values).float(), values.float() @ exact.T)
        assert close.item() > 0.999


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_head_of_4_bits_needs_int4(dtype):
    with pytest.raises(PartInferError, match=f"head_dtype int4 belongs to dtype int4, got dtype {dtype}"):
        PartInferConfig(dtype=dtype, head_dtype="int4")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_float_model_has_no_head_type(checkpoint, name):
    with pytest.raises(PartInferError, match=f"head_dtype {name} belongs to quantised weights: give --dtype int4"):
        load_model(checkpoint, PartInferConfig(method="dense", head_dtype=name, device="cpu"))


def test_generates(checkpoint):
    ours = load(checkpoint, "int8", kernels="auto")
    input_ids, attention_mask = padded_prompts([7, 3, 1], "left")
    options = {"attention_mask": attention_mask, "max_new_tokens": 5, "do_sample": False}
    first, again = (ours.model.generate(input_ids, **options) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape[1] > input_ids.shape[1]


def test_types_of_quantized_weights_survive_conversions():
    weight = QuantizedWeight(4, 64, kernels.INT4)
    weight.fill(kernels.quantize(torch.randn(4, 64), kernels.INT4))
    before = weight.packed
    weight.to(torch.bfloat16).float()
    assert weight.packed is before
    assert weight.data.dtype == torch.uint8


def test_a_hidden_size_without_groups_is_an_error(tmp_path):
    config = AutoConfig.for_model(
        "llama", hidden_size=48, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, vocab_size=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(PartInferError, match="--dtype int4 needs a hidden size that is a multiple of 32.* has 48"):
        load_model(tmp_path, PartInferConfig(method="dense", dtype="int4", device="cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize("memory_limit", [False, True])
@pytest.mark.parametrize("dtype", BITS)
def test_cuda_gives_the_logits_of_the_cpu(dtype, memory_limit, tiny_checkpoints, quantized):
    settings = {"memory_limit": memory_limit, "device": "cuda", "dtype": dtype, "start_num": 1, "end_num": 4}
    ours = load_model(tiny_checkpoints["llama"], PartInferConfig(**settings), DATASET, MODEL)
    ours.model.float()
    assert {layer.rows.down.device.type for layer in ours.state.layers} == {"cpu" if memory_limit else "cuda"}
    all_passes = passes(*padded_prompts([5, 2], "left"), [1, 1, 2])
    on_gpu = [(ids.cuda(), {name: value.cuda() for name, value in kwargs.items()}) for ids, kwargs in all_passes]
    expected = run(quantized("llama", dtype, "partinfer").model, all_passes)
    for a, b in zip(run(ours.model, on_gpu), expected, strict=True):
        assert (a.cpu() - b).abs().max() < 1e-3
