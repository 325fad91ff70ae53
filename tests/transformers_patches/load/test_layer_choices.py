"""Models whose tokens choose what they read of every decoder layer: inputs, neurons, rows of down."""

import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from tests.conftest import FAMILY_CONFIGS, LAYERS, random_neuron_file
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.fast_pass.one_token import new_cache
from transformers_patches.load.input_swap import set_layer_choices
from transformers_patches.load.loader import load_run
from transformers_patches.neurons.byte_ladder import INPUTS, InputChoice, LayerChoice
from transformers_patches.plan.max_loss import everything_loaded
from transformers_patches.plan.resolve import RunFiles
from transformers_patches.plan.run import resolve_run, with_layer_choices
from transformers_patches.weights.model_files import open_weights, read_config

PROMPT = torch.arange(3, 23)[None]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3"]
NEURONS = 96  # whole groups of quantised values
NEURON_FILE = random_neuron_file(1, LAYERS, NEURONS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        model_type, options = FAMILY_CONFIGS[family]
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            model_type,
            **{**options, "intermediate_size": NEURONS, "hidden_size": 128, "head_dim": 32, "initializer_range": 0.05},
        )
        made[family] = tmp_path_factory.mktemp(family)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(made[family])
    return made


def choices(config, threshold: float, neurons: float = 1.0, down: float = -1.0) -> list[LayerChoice]:
    """Random means and norms, the same thresholds everywhere."""
    torch.manual_seed(0)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = dict(zip(INPUTS, (config.hidden_size, head * config.num_attention_heads, config.hidden_size), strict=True))

    def one() -> LayerChoice:
        inputs = {n: InputChoice(torch.randn(w) * 0.1, torch.rand(w) + 0.5, threshold) for n, w in widths.items()}
        return LayerChoice(inputs, neurons, 0.0, down)

    return [one() for _ in range(config.num_hidden_layers)]


def load(folder, made, *, dtype="float32", native=True):
    config = read_config(folder)
    settings = PartInferConfig(method="partinfer", device="cpu", dtype=dtype, kernels="native" if native else "torch")
    settings = everything_loaded(settings, config.num_hidden_layers, 0.5)
    run = with_layer_choices(
        resolve_run(settings, config, RunFiles.of(settings, NEURON_FILE, NEURON_FILE)), made(config)
    )
    return load_run(run, open_weights(folder), time.perf_counter())


def decode(model, cache, steps: int = 6) -> torch.Tensor:
    """Logits [steps, V] of given tokens, one at a time, after the prompt."""
    logits = []
    with torch.inference_mode():
        model(PROMPT, past_key_values=cache, use_cache=True)
        for token in range(40, 40 + steps):
            logits.append(model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1])
    return torch.stack(logits)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).float().norm() / other.float().norm())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_whoever_reads_everything_computes_the_dense_model(folders, family, native):
    loaded = load(folders[family], lambda config: choices(config, -1.0), native=native)
    plain = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    ours = decode(loaded.model, new_cache(loaded.model))
    torch.testing.assert_close(ours, decode(plain, DynamicCache()), rtol=1e-4, atol=1e-4)
    dense = loaded.report.bytes_resident
    embedding = loaded.model.get_input_embeddings().weight
    if embedding is not loaded.model.get_output_embeddings().weight:
        dense -= embedding.nbytes
    assert loaded.token_bytes() == dense


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_native_decoder_computes_what_pytorch_does(folders, family):
    if not kernels.available():
        pytest.skip(f"no native kernels: {kernels.why_not()}")
    loaded = load(folders[family], lambda config: choices(config, 0.3, 0.6, 1e-3))
    natively, read = decode(loaded.model, new_cache(loaded.model)), loaded.token_bytes()
    loaded.reset_counters()
    ordinary, masked = decode(loaded.model, DynamicCache()), loaded.token_bytes()
    assert relative(natively, ordinary) < 1e-3
    assert read < 0.95 * loaded.report.bytes_resident
    assert read == pytest.approx(masked, rel=1e-3)


@pytest.mark.parametrize("dtype, close", [("bfloat16", 0.05), ("int8", 0.05), ("int4", 0.08)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_format_is_read_by_list(folders, family, dtype, close):
    """Thresholds of 0 leave out nothing but go through the lists: what is chosen can't hang on roundings."""
    if not kernels.available():
        pytest.skip(f"no native kernels: {kernels.why_not()}")
    loaded = load(folders[family], lambda config: choices(config, 0.0, 1.0, 0.0), dtype=dtype)
    natively = decode(loaded.model, new_cache(loaded.model))
    assert relative(natively, decode(loaded.model, DynamicCache())) < close


def test_what_is_left_out_is_left_out(folders):
    """By hand: q of the first layer from the inputs that are far from their mean, the rest at their mean."""
    loaded = load(folders["llama"], lambda config: choices(config, 0.5), native=False)
    layer = loaded.model.model.layers[0]
    plain = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    x = torch.randn(1, 1, loaded.model.config.hidden_size)
    chosen = layer.self_attn.q_proj.layer
    kept = (x - chosen.mean).abs() * chosen.norm > 0.5
    assert 0 < kept.sum() < kept.numel()
    loaded.state.phase = "decode"
    expected = plain.model.layers[0].self_attn.q_proj(torch.where(kept, x, chosen.mean))
    torch.testing.assert_close(layer.self_attn.q_proj(x), expected, rtol=1e-4, atol=1e-5)


def test_choices_can_be_set_again(folders):
    folder = folders["llama"]
    loaded = load(folder, lambda config: choices(config, 0.5, 0.4, 1e-4))
    few = decode(loaded.model, new_cache(loaded.model))
    set_layer_choices(loaded, choices(loaded.model.config, -1.0))
    everything = decode(loaded.model, new_cache(loaded.model))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(everything, decode(plain, DynamicCache()), rtol=1e-4, atol=1e-4)
    assert relative(few, everything) > 1e-3


def test_q_k_and_v_lie_next_to_each_other(folders):
    if not kernels.available():
        pytest.skip(f"no native kernels: {kernels.why_not()}")
    loaded = load(folders["llama"], lambda config: choices(config, 0.3))
    attention = loaded.model.model.layers[0].self_attn
    q, k, v = (getattr(attention, f"{name}_proj").weight for name in "qkv")
    assert k.data_ptr() == q.data_ptr() + q.shape[1] * q.element_size()
    assert q.stride(0) == q.shape[1] + k.shape[1] + v.shape[1]
