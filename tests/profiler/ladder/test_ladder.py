"""Byte ladders from texts: gradients, options against plain arithmetic, budgets, and shares that thresholds keep."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Phi3Config

from profiler.ladder.allocation import allocate
from profiler.ladder.build import BUDGETS, make_ladder
from profiler.ladder.capture import FFN, capture, shortened
from profiler.ladder.layer import float_layer
from profiler.ladder.options import Option, ffn_options, input_options, layer_options, threshold_for
from tests.conftest import HIDDEN, INTERMEDIATE, LAYERS
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.modules.fast_linear import FastLinear, replace_linears
from transformers_patches.neurons.byte_ladder import INPUTS

GENERATOR = torch.Generator().manual_seed(3)
TEXTS = [torch.randint(3, 120, (length,), generator=GENERATOR).tolist() for length in (50, 70, 9)]
LAYER = 2


def load(tiny_checkpoints, family: str):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoints[family], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prepared(tiny_checkpoints):
    """A model with biases in q, k and v, what was seen of a layer, and the layer in float32."""
    model = load(tiny_checkpoints, "qwen2")
    seen = capture(model, TEXTS, quiet=True)[LAYER]
    with torch.no_grad():
        return model, seen, float_layer(model, LAYER, seen)


def test_gradients_are_those_of_drawn_labels(tiny_checkpoints):
    model = load(tiny_checkpoints, "llama")
    ids = TEXTS[1]
    seen = capture(model, [ids], quiet=True)
    assert len(seen) == LAYERS
    logits = model(torch.tensor([ids])).logits[0].softmax(-1)
    drawn = torch.multinomial(logits.detach(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    added, layer = torch.zeros(len(ids), HIDDEN, requires_grad=True), model.model.layers[LAYER]
    hook = layer.mlp.register_forward_hook(lambda module, args, output: output + added)
    F.cross_entropy(model(torch.tensor([ids])).logits[0], drawn, reduction="sum").backward()
    hook.remove()
    expected = added.grad[8:].square().sum(0)  # the first tokens do not count
    assert torch.allclose(seen[LAYER].square_sums[FFN], expected, rtol=1e-3)
    assert seen[LAYER].tokens == len(ids) - 8
    assert {name: values.shape[1] for name, values in seen[LAYER].inputs.items()} == dict.fromkeys(INPUTS, HIDDEN)


def test_the_model_is_as_before(tiny_checkpoints):
    model = load(tiny_checkpoints, "llama")
    replace_linears(model)
    capture(model, TEXTS, quiet=True)
    assert isinstance(model.model.layers[0].mlp.up_proj, FastLinear)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_texts_are_cut_and_limited():
    chosen = shortened([[1, 2], [1] * 1000, *[[1] * 300] * 10])
    assert [len(ids) for ids in chosen] == [320, 300, 300, 300, 300, 300]


@torch.no_grad()
def test_predictions_of_inputs_are_half_the_mean_square_of_gradient_times_error(prepared):
    model, seen, layer = prepared
    attention = model.model.layers[LAYER].self_attn
    mean, norm = layer.mean["attention"].float(), layer.norm["attention"].float()
    for option in layer_options(layer)[0][1:]:
        x = seen.inputs["attention"]
        read = (x - mean).abs() * norm > option.thresholds["attention"]
        replaced = torch.where(read, x, mean)
        errors = torch.zeros(len(x))
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(attention, name)
            errors += ((linear(replaced) - linear(x)) * seen.gradients[f"self_attn.{name}"]).sum(1)
        assert option.loss == pytest.approx(float(errors.square().mean() / 2), rel=1e-3)
        weights = sum(p.weight.numel() for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        assert option.weights == pytest.approx(float(read.float().mean()) * weights)


@torch.no_grad()
def test_predictions_of_ffns_are_half_the_mean_square_of_gradient_times_error(prepared):
    model, seen, layer = prepared
    ffn, x = model.model.layers[LAYER].mlp, seen.inputs["ffn"]
    mean, norm, down_norm = layer.mean["ffn"].float(), layer.norm["ffn"].float(), ffn.down_proj.weight.norm(dim=0)
    gate_size = ffn.act_fn(ffn.gate_proj(x)).square().mean(0).sqrt()
    for option in list(ffn_options(layer))[1::7]:
        read = (x - mean).abs() * norm > option.thresholds["ffn"]
        up = ffn.up_proj(torch.where(read, x, mean))
        chosen = up.abs() * gate_size * down_norm > option.thresholds["neurons"]
        h = ffn.act_fn(ffn.gate_proj(x)) * up * chosen
        kept = (h.abs() * down_norm > option.thresholds["down"]) & chosen
        errors = ((ffn.down_proj(h * kept) - ffn(x)) * seen.gradients[FFN]).sum(1)
        assert option.loss == pytest.approx(float(errors.square().mean() / 2), rel=1e-2, abs=1e-9)
        shares = [float(mask.float().mean()) for mask in (read, chosen, kept)]
        # a threshold is one of the scores, and which side of it that one is on depends on how sums are rounded
        assert option.neurons == pytest.approx(shares[1], abs=1.5 / chosen.numel())
        assert option.weights == pytest.approx(sum(shares) * HIDDEN * INTERMEDIATE, rel=1e-3)


@torch.no_grad()
def test_options_have_the_shares_that_they_are_for(prepared):
    layer = prepared[2]
    weights = layer.weights["attention"]
    options = input_options("attention", layer.attention, layer.norm["attention"], weights)
    assert [o.weights / weights for o in options[:4]] == pytest.approx([1.0, 0.9, 0.8, 0.7], abs=0.01)
    assert options[0].loss == 0
    first, *others = ffn_options(layer)
    assert (first.weights, first.loss) == (3 * HIDDEN * INTERMEDIATE, 0.0)
    assert set(first.thresholds.values()) == {-1.0}
    assert {round(option.neurons, 2) for option in others} == {1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2}


def test_thresholds_of_many_scores_keep_the_share_nearly():
    scores = torch.rand(700, 600, generator=GENERATOR)
    assert float((scores > threshold_for(scores, 0.3)).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert threshold_for(scores, 1.0) < 0


def test_budgets_are_kept_and_no_better_choice_of_the_same_size_exists():
    def draw(count: int) -> list[Option]:
        sizes = sorted(torch.rand(count, generator=GENERATOR).tolist(), reverse=True)
        losses = sorted(torch.rand(count, generator=GENERATOR).square().tolist())
        return [Option(1.0, 0.0, {}), *(Option(s, n, {}) for s, n in zip(sizes, losses, strict=True))]

    groups = [draw(4) for _ in range(4)]
    for budget in (3.5, 2.5, 1.8):
        chosen = allocate(groups, budget)
        size, loss = sum(o.weights for o in chosen), sum(o.loss for o in chosen)
        assert size <= budget
        for other in itertools.product(*groups):
            assert sum(o.weights for o in other) > size or sum(o.loss for o in other) >= loss - 1e-9
    assert allocate(groups, 0.0) is None
    assert [o.weights for o in allocate(groups, 4.0)] == [1.0] * 4


def test_a_ladder_reads_no_more_than_its_budgets_and_costs_more_with_fewer_bytes(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if checkpoint.name == "opt":
        with pytest.raises(PartInferError, match="no byte ladder: opt has plain FFNs"):
            make_ladder(model, TEXTS, quiet=True)
        return
    ladder = make_ladder(model, TEXTS, quiet=True)
    shares = [rung.block_bytes for rung in ladder.rungs]
    assert all(share <= budget for share, budget in zip(shares, BUDGETS, strict=True))
    assert shares[-1] > 0.36
    losses = [rung.loss for rung in ladder.rungs]
    assert losses == sorted(losses)
    assert 0 < losses[0] < 0.01
    assert ladder.num_layers == LAYERS
    assert ladder.mean["ffn"].dtype == ladder.norm["ffn"].dtype == torch.float16


def test_texts_of_two_tokens_make_no_ladder(tiny_checkpoints):
    with pytest.raises(PartInferError, match="three tokens"):
        make_ladder(load(tiny_checkpoints, "llama"), [[1, 2]], quiet=True)


def test_models_from_the_projects_own_loading_have_gradients_too(tiny_checkpoints):
    """As those of GGUF files are loaded."""
    settings = PartInferConfig(method="dense", dtype="float32", device="cpu", kernels="torch")
    own = make_ladder(load_model(tiny_checkpoints["llama"], settings).model, TEXTS, quiet=True)
    plain = make_ladder(load(tiny_checkpoints, "llama"), TEXTS, quiet=True)
    assert [rung.loss for rung in own.rungs] == pytest.approx([rung.loss for rung in plain.rungs], rel=0.05)


def test_gradients_that_are_not_finite_are_said(tiny_checkpoints):
    model = load(tiny_checkpoints, "llama")
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(PartInferError, match="no byte ladder: the model's predictions are not finite"):
        make_ladder(model, TEXTS, quiet=True)


def test_architectures_without_an_entry_get_none():
    config = Phi3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        pad_token_id=0,
    )
    with pytest.raises(PartInferError, match="no byte ladder: phi3 has no entry"):
        make_ladder(AutoModelForCausalLM.from_config(config), TEXTS, quiet=True)
