"""Every architecture of the table, with a tiny random model: dense, sparse, native, in few bits, packed, generating."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel

from profiler.collect import Collector
from profiler.layerwise import FFNWeights, LayerwiseModel, make_batches
from profiler.loss_measurement import LossMeasurement, ScoredText
from tests.conftest import random_neuron_file
from tests.expert_files import expert_file
from tests.model_table import LAYERS, MODELS, SIZE, VARIANTS, tiny_model
from tests.transformers_patches.masked_reference import MaskedReference, NaiveMethod
from tests.transformers_patches.model_passes import padded_prompts, passes, run, run_reference
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import FAMILIES
from transformers_patches.generation.generate import generate_ids
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.load.paths import EXPERTS, FFN, LINEAR, layer_paths
from transformers_patches.modules.quantized import QuantizedEmbedding, QuantizedLinear
from transformers_patches.plan.neuron_files import settings_for, why_dense
from transformers_patches.sparse.cut_ffn import CutFFN
from transformers_patches.sparse.experts import Experts

PASSES = passes(*padded_prompts([9, 3, 1], "left"), [1, 1, 3])  # longer than the sliding windows
ONE = passes(*padded_prompts([9], "left"), [1, 1])
BASE, OTHER = (random_neuron_file(seed, LAYERS, SIZE) for seed in (1, 2))
EVERYTHING = {"sparsity": 1.0, "loaded_neurons_percent": 1.0, "base_neurons_percent": 1.0}
ORIGINAL = {"selection": "core", "compensation": "none"}
SPARSE = [name for name, model in MODELS.items() if model.sparse]
PACKED_EXPERTS = [name for name, model in MODELS.items() if model.experts and name != "gpt_oss"]


@dataclass
class Made:
    """A tiny model as transformers has it, and its folder."""

    model: PreTrainedModel
    folder: Path

    def load(self, **settings) -> LoadedModel:
        options = {"device": "cpu", "kernels": "torch", "dtype": "float32", **settings}
        if options.get("method") != "dense" or options.get("use_partial_loading"):
            options |= {"start_num": 0, "end_num": LAYERS - 1}
        files = (BASE, OTHER) if MODELS[self.model.config.model_type].sparse else ()
        return load_model(self.folder, PartInferConfig(**options), *files)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(model_type): made once."""

    @cache
    def make(model_type: str) -> Made:
        folder = tmp_path_factory.mktemp(model_type)
        model = tiny_model(model_type)
        model.save_pretrained(folder)
        return Made(model, folder)

    return make


def differences(ours: list[torch.Tensor], expected: list[torch.Tensor], all_passes: list) -> float:
    """The largest at a token that is no padding."""
    real = all_passes[0][1]["attention_mask"].bool()
    first, *rest = [(a - b).abs() for a, b in zip(ours, expected, strict=True)]
    return max(float(first[real].max()), *[float(part.max()) for part in rest])


def test_every_family_but_opt_is_in_the_table():
    assert set(FAMILIES) - set(MODELS) == {"opt"}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_configs_are_transformers(made, tmp_path, name):
    """Bit for bit with PyTorch, and greedy tokens with the native kernels. Read from files: configs may change there.

    For some experts from_pretrained takes other matrix products than from_config: then to rounding.
    """
    model_type, options = VARIANTS[name]
    tiny_model(model_type, options).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    dense = {"method": "dense", "device": "cpu", "dtype": "float32"}
    ours = {kernel: load_model(tmp_path, PartInferConfig(**dense, kernels=kernel)) for kernel in ("torch", "auto")}
    plain, expected = run(ours["torch"].model, PASSES), run(theirs, PASSES)
    if "experts" in name:
        assert differences(plain, expected, PASSES) < 1e-5
    else:
        assert all(torch.equal(a, b) for a, b in zip(plain, expected, strict=True))
    assert differences(run(ours["auto"].model, PASSES), run(theirs, PASSES), PASSES) < 1e-4
    ids, config = torch.arange(5, 16)[None], GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    config.eos_token_id = None
    expected = theirs.generate(ids, generation_config=config, past_key_values=DynamicCache(config=theirs.config))
    assert torch.equal(generate_ids(ours["auto"], ids, config, None), expected)


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3_5_text", "glm4_moe", "lfm2_moe", "falcon_h1", "gpt_oss", "gemma3n_text"]
)
def test_sixteen_bits_are_transformers_bit_for_bit(made, model_type):
    """What transformers keeps in float32 (biases of routers, decays) is in float32 here, too."""
    one = made(model_type)
    theirs = AutoModelForCausalLM.from_pretrained(one.folder, dtype=torch.bfloat16).eval()
    ours = one.load(method="dense", dtype="bfloat16").model
    types = {name: p.dtype for name, p in theirs.state_dict().items()}
    assert types == {name: p.dtype for name, p in ours.state_dict().items()}
    for a, b in zip(run(ours, PASSES), run(theirs, PASSES), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model_type", MODELS)
def test_dense_is_transformers_bit_for_bit(made, model_type):
    one = made(model_type)
    loaded = one.load(method="dense")
    for a, b in zip(run(loaded.model, PASSES), run(one.model, PASSES), strict=True):
        assert torch.equal(a, b)
    ids, config = torch.arange(5, 16)[None], GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = one.model.generate(ids, generation_config=config, past_key_values=DynamicCache(config=one.model.config))
    assert torch.equal(generate_ids(loaded, ids, config, None), expected)


@pytest.mark.parametrize("model_type", SPARSE)
def test_all_neurons_are_transformers(made, model_type):
    one = made(model_type)
    expected = run(one.model, PASSES)
    loaded = one.load(method="partinfer", **ORIGINAL, **EVERYTHING)
    assert list(loaded.plan.layers) == [layer for layer in range(LAYERS) if layer not in MODELS[model_type].whole]
    assert differences(run(loaded.model, PASSES), expected, PASSES) < 1e-4


@pytest.mark.parametrize("model_type", [name for name, model in MODELS.items() if model.experts])
def test_all_neurons_of_experts_are_transformers(made, model_type):
    one = made(model_type)
    settings = {"selection": "up", "compensation": "none", "sparsity": 1.0, "loaded_neurons_percent": 1.0}
    loaded = one.load(method="partinfer", **settings)
    assert list(loaded.plan.experts) == list(MODELS[model_type].whole)
    assert differences(run(loaded.model, PASSES), run(one.model, PASSES), PASSES) < 1e-4


def test_what_cannot_be_packed_is_refused(made, tmp_path):
    sparse = {"method": "partinfer", "selection": "up", "compensation": "none", "loaded_neurons_percent": 1.0}
    with pytest.raises(PartInferError, match="gpt_oss's experts can't be packed, because columns of gate and up take"):
        write_pack(made("gpt_oss").folder, tmp_path / "pack", PartInferConfig(**sparse, device="cpu"))
    one = made("qwen3_moe")
    half = PartInferConfig(**sparse | {"loaded_neurons_percent": 0.5}, device="cpu", start_num=0, end_num=LAYERS - 1)
    with pytest.raises(PartInferError, match="experts in part can't be packed: add --loaded_neurons_percent 1"):
        write_pack(one.folder, tmp_path / "pack", half, expert_file(one.model))


@pytest.mark.parametrize("model_type", SPARSE)
def test_sparse_is_masked_dense_and_native_is_torch(made, model_type):
    one, table = made(model_type), MODELS[model_type]
    layers = [layer for layer in range(LAYERS) if layer not in table.whole]
    formula = NaiveMethod("partinfer", True, BASE.ranking.tolist(), OTHER.ranking.tolist(), layers)
    with_experts = len(table.whole) if "moe" in model_type else 0
    down = re.compile(rf"layers\.(\d+)\.{re.escape(table.down)}$")
    reference = MaskedReference(one.folder, down, with_experts)
    expected = run_reference(reference, formula, PASSES)
    assert differences(run(one.load(method="partinfer", **ORIGINAL).model, PASSES), expected, PASSES) < 1e-4
    if not kernels.available():
        return
    for settings in (ORIGINAL, {"selection": "up", "compensation": "none"}):
        native, torch_ = (one.load(method="partinfer", kernels=name, **settings) for name in ("native", "torch"))
        assert differences(run(native.model, ONE), run(torch_.model, ONE), ONE) < 1e-4
        assert native.bytes_fraction() == pytest.approx(torch_.bytes_fraction())


def put_experts(ours: Experts, theirs: nn.Module) -> None:
    """Give transformers' experts the weights that ours hold."""
    gate, up, down = (
        torch.stack([kernels.dequantize(rows.weight(name)) for rows in ours.rows]) for name in ("gate", "up", "down")
    )
    if ours.interleaved:
        theirs.gate_up_proj = nn.Parameter(torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, 2).contiguous())
        theirs.down_proj = nn.Parameter(down)
        return
    theirs.gate_up_proj = nn.Parameter(torch.cat([gate, up], dim=1))
    theirs.down_proj = nn.Parameter(down.transpose(1, 2).contiguous())


@pytest.mark.parametrize("model_type", [name for name, model in MODELS.items() if model.whole])
def test_native_experts_are_transformers(native, made, model_type):
    one = made(model_type)
    loaded = one.load(method="dense", kernels="native")
    paths = layer_paths(loaded.model, native=True)
    known = model_type not in ("bitnet", "gemma3n_text")  # they have no experts
    assert [path == EXPERTS for path in paths] == [known and n in MODELS[model_type].whole for n in range(LAYERS)]
    assert differences(run(loaded.model, PASSES), run(one.model, PASSES), PASSES) < 1e-4
    if known:
        unread = sum(rows.row_bytes for m in loaded.model.modules() if isinstance(m, Experts) for rows in m.rows)
        head = loaded.model.get_input_embeddings().weight.nbytes
        tied = loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
        rest = loaded.report.bytes_resident - (0 if tied else head)
        assert loaded.token_bytes() == pytest.approx(rest - unread * 4 / 6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_neurons_that_the_model_cuts_are_not_read(native, made, dtype):
    one = made("gemma3n_text")
    loaded, plain = (one.load(method="dense", kernels=name, dtype=dtype) for name in ("native", "torch"))
    assert layer_paths(loaded.model, native=True) == [FFN, FFN, LINEAR, LINEAR]
    bound = 1e-4 if dtype == "float32" else 0.3  # in few bits, sums are in 16
    assert differences(run(loaded.model, ONE), run(plain.model, ONE), ONE) < bound
    cut = [module for module in loaded.model.modules() if isinstance(module, CutFFN)]
    assert [module.tokens for module in cut] == [2, 2]
    assert all(0 < module.neurons / module.tokens < 0.2 * SIZE for module in cut)
    assert loaded.token_bytes() < plain.token_bytes()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("model_type", MODELS)
def test_few_bits_are_transformers_with_the_weights_that_they_stand_for(made, model_type, dtype):
    one = made(model_type)
    loaded = one.load(method="dense", dtype=dtype)
    loaded.model.float()
    plain = copy.deepcopy(one.model)
    plain.load_state_dict(loaded.model.state_dict(), strict=False)  # those that are not quantised were in 16 bits
    for name, module in loaded.model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            plain.get_submodule(name).weight = nn.Parameter(kernels.dequantize(module.weight.packed))
        if isinstance(module, Experts):
            put_experts(module, plain.get_submodule(name))
    assert differences(run(loaded.model, ONE), run(plain, ONE), ONE) < 1e-4
    ids, config = torch.arange(5, 16)[None], GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert generate_ids(loaded, ids, config, None).shape[1] > ids.shape[1]


@pytest.mark.parametrize("model_type", SPARSE)
def test_rows_in_8_bits_stay_near(made, model_type):
    one = made(model_type)
    loaded = one.load(method="dense", use_partial_loading=True, loaded_neurons_percent=1.0, dtype="int8")
    ours, expected = (torch.cat([part.flatten() for part in run(m, ONE)]).float() for m in (loaded.model, one.model))
    assert (ours - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("model_type", SPARSE)
def test_a_pack_is_the_model(made, tmp_path, model_type, dtype):
    one, settings = made(model_type), {"method": "partinfer", "dtype": dtype, **ORIGINAL}
    loaded = one.load(**settings)
    options = PartInferConfig(**settings, start_num=0, end_num=LAYERS - 1, device="cpu", kernels="torch")
    write_pack(one.folder, tmp_path / "pack", options, BASE, OTHER)
    packed = load_model(tmp_path / "pack", options)
    for a, b in zip(run(packed.model, ONE), run(loaded.model, ONE), strict=True):
        if (
            model_type == "gemma3n_text"
        ):  # layers that cut activations are stored by neuron in packs, and add in another order
            assert (a - b).abs().max() < (1e-4 if dtype == "float32" else 0.3)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("model_type", PACKED_EXPERTS)
def test_a_pack_has_experts(made, tmp_path, model_type, dtype):
    one = made(model_type)
    settings = {"method": "partinfer", "dtype": dtype, "selection": "up", "compensation": "none", "sparsity": 0.7}
    loaded = one.load(**settings, loaded_neurons_percent=1.0)
    options = PartInferConfig(
        **settings, loaded_neurons_percent=1.0, start_num=0, end_num=LAYERS - 1, device="cpu", kernels="torch"
    )
    files = (BASE, OTHER) if MODELS[model_type].sparse else ()  # for layers without experts
    write_pack(one.folder, tmp_path / "pack", options, *files)
    packed = load_model(tmp_path / "pack", options)
    assert packed.plan.experts == loaded.plan.experts
    for a, b in zip(run(packed.model, ONE), run(loaded.model, ONE), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model_type", ["phi3", "granite", "qwen3_5_text", "cohere2", "glm4_moe"])
@torch.no_grad()
def test_layers_run_one_by_one(made, model_type):
    model = made(model_type).model
    layerwise = LayerwiseModel(model)
    (batch,) = make_batches([[5, 6, 7, 8, 9]], [2], 1)
    hidden = layerwise.inputs(batch)
    for layer in range(LAYERS):
        hidden = layerwise.run(layer, hidden)
    expected = torch.log_softmax(model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:], dim=-1)
    torch.testing.assert_close(layerwise.log_probabilities(batch, hidden), expected, rtol=1e-4, atol=1e-4)
    weights, down = FFNWeights.of(model, 1), model.get_submodule(f"model.layers.1.{MODELS[model_type].down}")
    x, seen = torch.randn(3, model.config.hidden_size), []
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ffn = model.get_submodule(f"model.layers.1.{MODELS[model_type].down.rpartition('.')[0]}")
    expected = ffn(x)
    handle.remove()
    h, _, _ = weights.activations(x)
    torch.testing.assert_close(h, seen[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.output(h), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["falcon_h1", "gemma3n_text"])
def test_what_cannot_be_run_layer_by_layer_is_refused(made, model_type):
    with pytest.raises(PartInferError, match=f"the layers of {model_type} can't be run one by one"):
        LayerwiseModel(made(model_type).model)


@pytest.mark.parametrize("model_type", ["phi3", "apertus", "gpt_neox", "qwen3_5_text", "gemma3n_text"])
def test_it_is_profiled(made, model_type):
    one, layer = made(model_type), LAYERS - 1
    seen = []
    down = one.model.get_submodule(f"{'gpt_neox' if model_type == 'gpt_neox' else 'model'}.layers.{layer}")
    handle = down.get_submodule(MODELS[model_type].down).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    collector = Collector.of(one.model, max_new_tokens=0)
    assert collector.observe([[5, 6, 7]]) == 3
    handle.remove()
    collector.statistics.commit(3)
    means = collector.statistics.means()["mean_abs"][layer]
    torch.testing.assert_close(means.float(), seen[0][0].abs().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen3_moe", "bitnet", "gpt_oss"])
def test_the_default_runs_everything(made, model_type):
    one = made(model_type)
    settings = settings_for(one.folder, {"device": "cpu", "dtype": "float32"}, "QA")
    dense = model_type == "bitnet"
    assert (settings.method, why_dense(one.folder) is not None) == ("dense" if dense else "partinfer", dense)
    loaded = load_model(one.folder, settings)
    assert len(loaded.plan.layers) + len(loaded.plan.experts) == (0 if dense else LAYERS)
    assert all(part.isfinite().all() for part in run(loaded.model, ONE))


@pytest.mark.parametrize("model_type", [name for name, model in MODELS.items() if not model.sparse])
def test_what_cannot_be_sparse_says_why(made, model_type):
    with pytest.raises(PartInferError, match=f"{model_type} can't be computed by neurons: .*use --method dense"):
        made(model_type).load(method="partinfer")


@pytest.mark.parametrize("model_type", ["gemma3n_text", "qwen3_5_text"])
def test_its_loss_curve_is_measured(made, model_type):
    """Layers that can't be computed by neurons have zeros in it; caches that can't be cut are copied."""
    one, settings = made(model_type), {"device": "cpu", "dtype": "float32", "kernels": "torch"}
    texts = [ScoredText(list(range(5, 17)), list(range(20, 26)))]
    curve = LossMeasurement(one.folder, settings, BASE, texts).curve(quiet=True)
    whole = MODELS[model_type].whole
    assert curve.thresholds.shape[1] == LAYERS
    assert curve.gate_size.shape == (LAYERS, SIZE)
    assert [bool(row.any()) for row in curve.gate_size] == [layer not in whole for layer in range(LAYERS)]
    by_share = {point.sparsity: point.kl for point in curve.points if point.loaded == 1 and point.layers == "all"}
    assert 0 <= by_share[max(by_share)] < by_share[min(by_share)]
