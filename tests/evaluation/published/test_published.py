"""CATS, TEAL and WINA on a tiny model, against loops over plain transformers, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.evaluate_perplexity import main
from evaluation.evaluate_speed import main as speed
from evaluation.evaluate_task import main as tasks
from evaluation.published.attach import attach
from evaluation.published.calibration import calibration_ids
from evaluation.published.histogram import Histogram
from evaluation.published.projections import parts_of
from evaluation.published.rotation import ORTHOGONAL, rotate
from evaluation.published.settings import PublishedSettings
from evaluation.scoring import continuation_logits
from tests.conftest import LAYERS
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model

PROJECTIONS = {
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
PROMPT, SCORED = 24, 8


@pytest.fixture
def with_baseline(model_folder, text_file):
    """Loads the tiny model with a baseline."""

    def make(name: str, sparsity: float = 0.4, **options):
        loaded = load_model(model_folder, PartInferConfig(method="dense", device="cpu"))
        settings = PublishedSettings(name, sparsity, str(text_file), 512, **options)
        ids = calibration_ids(settings, model_folder, loaded, 0)
        attach(loaded, settings, model_folder, 0)
        return loaded, ids

    return make


def by_hand(folder, ids, places, change, prompt, model=None) -> torch.Tensor:
    """Logits of `ids` by plain transformers, with the inputs (or outputs) of modules changed from token `prompt` on."""
    model = AutoModelForCausalLM.from_pretrained(folder) if model is None else model
    for name, module in model.named_modules():
        place = next((p for p in places if name.endswith(p)), None)
        if place is None:
            continue

        def masked(x, module=module, name=name):
            return torch.cat([x[:, :prompt], change(name, module, x[:, prompt:])], dim=1)

        if places[place] == "input":
            module.register_forward_pre_hook(lambda _m, inputs, masked=masked: (masked(inputs[0]),))
        else:
            module.register_forward_hook(lambda _m, _i, output, masked=masked: masked(output))
    with torch.inference_mode():
        return model(ids[None]).logits[0]


def sizes_of(folder, ids, places) -> dict[str, torch.Tensor]:
    """|values| of each place over calibration texts, by plain transformers."""
    model, found = AutoModelForCausalLM.from_pretrained(folder), {}
    for name, module in model.named_modules():
        if any(name.endswith(p) for p in places):

            def keep(_m, inputs, output=None, name=name):
                found.setdefault(name, []).append((inputs[0] if output is None else output).abs().flatten())

            kind = next(places[p] for p in places if name.endswith(p))
            (module.register_forward_pre_hook if kind == "input" else module.register_forward_hook)(keep)
    with torch.inference_mode():
        for text in ids:
            model(text[None])
    return {name: torch.cat(values) for name, values in found.items()}


def cut_at(values: torch.Tensor, share: float) -> float:
    """The quantile, rounded up as the baselines round it, so that values beside it don't decide the comparison."""
    histogram = Histogram()
    histogram.add(values)
    assert histogram.quantile(share) == pytest.approx(float(values.quantile(share)), rel=2e-2)
    return histogram.quantile(share)


def decoded(loaded, ids) -> torch.Tensor:
    """Logits of the tokens after a prompt, as evaluations compute them."""
    loaded.reset_counters()
    context, target = ids[: PROMPT + 1].tolist(), ids[PROMPT + 1 :].tolist()
    return next(continuation_logits(loaded.model, [(context, [target])]))[2]


@pytest.fixture(scope="module")
def sample(model_folder) -> torch.Tensor:
    words = AutoTokenizer.from_pretrained(model_folder).encode("the quick brown fox jumps over the lazy dog " * 3)
    return torch.tensor(words[: PROMPT + 1 + SCORED])


def test_cats_is_the_papers(with_baseline, model_folder, sample):
    loaded, ids = with_baseline("cats")
    sizes = sizes_of(model_folder, ids, {"act_fn": "output"})
    cut = {name: cut_at(values, 0.4) for name, values in sizes.items()}
    kept = []

    def change(name, _module, x):
        kept.append(float((x.abs() > cut[name]).float().mean()))
        return x * (x.abs() > cut[name])

    expected = by_hand(model_folder, sample[:-1], {"act_fn": "output"}, change, PROMPT)[PROMPT:]
    assert torch.allclose(decoded(loaded, sample), expected, atol=1e-3)
    assert loaded.bytes_fraction() == pytest.approx((1 + 2 * sum(kept) / LAYERS) / 3, abs=1e-3)
    assert loaded.masked.decoded_tokens() == SCORED
    assert len(cut) == LAYERS


def test_teal_is_the_papers_with_one_share(with_baseline, model_folder, sample):
    loaded, ids = with_baseline("teal_uniform")
    places = dict.fromkeys(PROJECTIONS.values(), "input")
    cut = {name: cut_at(values, 0.4) for name, values in sizes_of(model_folder, ids, places).items()}
    whole = read = 0

    def change(name, module, x):
        nonlocal whole, read
        chosen = x.abs() > cut[name]
        whole += module.weight.numel()
        read += module.weight.numel() * float(chosen.float().mean())
        return x * chosen

    expected = by_hand(model_folder, sample[:-1], places, change, PROMPT)[PROMPT:]
    assert torch.allclose(decoded(loaded, sample), expected, atol=1e-3)
    left_out = loaded.whole_token_bytes() - loaded.token_bytes()
    assert left_out == pytest.approx(4 * (whole - read), rel=1e-2)


def test_wina_without_rotation_takes_the_largest_products_with_column_norms(with_baseline, model_folder, sample):
    loaded, _ = with_baseline("wina_plain")

    def change(_name, module, x):
        x, scores = x.clone(), x.abs() * module.weight.norm(dim=0)
        for token, mine in enumerate(scores[0]):
            fewest = mine.argsort()[: len(mine) - round(0.6 * len(mine))]
            x[0, token, fewest] = 0
        return x

    expected = by_hand(model_folder, sample[:-1], dict.fromkeys(PROJECTIONS.values(), "input"), change, PROMPT)[PROMPT:]
    assert torch.allclose(decoded(loaded, sample), expected, atol=1e-3)


def papers_rotated_model(folder):
    """Llama as the paper of WINA turns it: the residual stream itself, with a product in each shortcut."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = model.model.layers

    def basis(norm, projection) -> torch.Tensor:
        return torch.linalg.svd((projection.weight * norm.weight).double(), full_matrices=True).Vh.T

    turns = []  # of the residual stream, before each norm
    for layer in layers:
        turns.append(basis(layer.input_layernorm, layer.self_attn.k_proj))
        turns.append(basis(layer.post_attention_layernorm, layer.mlp.gate_proj))
    turns.append(torch.eye(model.config.hidden_size, dtype=torch.float64))  # the last norm reads what it always did
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.double() @ turns[0])
        for number, layer in enumerate(layers):
            attention, ffn = layer.self_attn, layer.mlp
            parts = [
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj),
                (layer.post_attention_layernorm, (ffn.gate_proj, ffn.up_proj), ffn.down_proj),
            ]
            for half, (norm, readers, writer) in enumerate(parts):
                now, following = turns[2 * number + half], turns[2 * number + half + 1]
                for reader in readers:
                    reader.weight.copy_((reader.weight * norm.weight).double() @ now)
                writer.weight.copy_(following.T @ writer.weight.double())
                norm.weight.fill_(1.0)
            layer.forward = turned_layer(layer, *(turns[n].T @ turns[n + 1] for n in (2 * number, 2 * number + 1)))
    return model


def turned_layer(layer, first, second):
    """The forward of a Llama layer with products in its shortcuts."""

    def forward(hidden, **options):
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)
        hidden = hidden @ first.float() + attended
        return hidden @ second.float() + layer.mlp(layer.post_attention_layernorm(hidden))

    return forward


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gemma3"])
def test_rotation_leaves_the_model_and_makes_columns_orthogonal(tiny_checkpoints, sample, family):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoints[family])
    loaded = load_model(tiny_checkpoints[family], PartInferConfig(method="dense", device="cpu"))
    layers = parts_of(loaded)
    before = layers[2].projections["k"].weight.detach().clone()
    rotate(layers)
    assert not torch.equal(before, layers[2].projections["k"].weight)
    with torch.inference_mode():
        expected, found = plain(sample[None]).logits, loaded.model(sample[None]).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    for parts in layers:
        for name in ORTHOGONAL:
            products = parts.projections[name].weight.double().T @ parts.projections[name].weight.double()
            assert (products - products.diag().diag()).norm() < 1e-4 * products.norm()


@pytest.mark.parametrize("name", ["wina", "wina_uniform"])
def test_wina_is_the_papers(with_baseline, model_folder, sample, name):
    """Norms of the columns of k and gate, sizes elsewhere, in the model that is turned as the paper turns it."""
    loaded, _ = with_baseline(name, step=0.5)
    found = decoded(loaded, sample)
    places = [f"layers.{layer}.{place}" for layer in range(LAYERS) for place in PROJECTIONS.values()]
    counts = {place: mask.kept // mask.tokens for place, mask in zip(places, loaded.masked.masks, strict=True)}
    model = papers_rotated_model(model_folder)
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(model_folder)(sample[None]).logits
        torch.testing.assert_close(model(sample[None]).logits, plain, atol=2e-4, rtol=2e-4)

    def change(module_name, module, x):
        weighted = module_name.endswith(("k_proj", "gate_proj"))
        scores = x.abs() * (module.weight.norm(dim=0) if weighted else 1.0)
        best = scores.topk(counts[module_name.removeprefix("model.")]).indices
        return x * torch.zeros_like(x).scatter_(-1, best, 1.0)

    expected = by_hand(model_folder, sample[:-1], dict.fromkeys(PROJECTIONS.values(), "input"), change, PROMPT, model)[
        PROMPT:
    ]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    shares = {counts[place] / module.in_features for place in places for module in [model.model.get_submodule(place)]}
    assert (max(shares) - min(shares) > 0.2) == (name == "wina")  # the search spends unevenly


def test_quantised_weights_are_not_rotated(model_folder):
    loaded = load_model(model_folder, PartInferConfig(method="dense", device="cpu", dtype="int8"))
    with pytest.raises(PartInferError, match="give --dtype bfloat16, or use wina_plain"):
        attach(loaded, PublishedSettings("wina_uniform"), model_folder, 0)


@pytest.mark.parametrize("name", ["cats", "teal_uniform", "teal", "wina", "wina_uniform", "wina_plain"])
def test_calibration_tokens_leave_out_the_asked_share(with_baseline, name):
    loaded, ids = with_baseline(name, step=0.5)
    counts = [[0, 0] for _ in loaded.masked.masks]
    for mask, count in zip(loaded.masked.masks, counts, strict=True):

        def counting(x, rule=mask.rule, count=count):
            chosen = rule(x)
            count[0] += chosen.numel()
            count[1] += int(chosen.sum())
            return torch.ones_like(chosen)  # so that what follows stays dense, as thresholds were taken

        mask.rule, mask.forced = counting, True
    with torch.inference_mode():
        loaded.model(ids)
    assert loaded.token_bytes() == loaded.whole_token_bytes()  # nothing was decoded
    kept = sum(mask.size * count[1] / count[0] for mask, count in zip(loaded.masked.masks, counts, strict=True))
    assert 1 - kept / sum(mask.size for mask in loaded.masked.masks) == pytest.approx(0.4, abs=0.02)


def test_teal_steps_where_the_layer_changes_least(with_baseline, monkeypatch):
    """Of two settings with the same bytes, the allocation is nearer to the dense layer than one share for all."""
    from evaluation.published import attach as module

    seen = {}
    allocate = module.allocate

    def watched(loaded, layers, masks, rule_at, settings, ids):
        shares = allocate(loaded, layers, masks, rule_at, settings, ids)
        from evaluation.published.block_wise import _Layer, _layer_calls

        call = _layer_calls(loaded, [parts.layer for parts in layers], ids[:1, :128])[2]
        layer = _Layer(layers[2].layer, call, masks[2], rule_at, 2)
        seen["greedy"], seen["uniform"] = layer.error(shares[2]), layer.error(dict.fromkeys(PROJECTIONS, 0.4))
        seen["shares"] = shares
        return shares

    monkeypatch.setattr(module, "allocate", watched)
    with_baseline("teal", step=0.2)
    assert 0 < seen["greedy"] < seen["uniform"]
    assert all(0 <= share <= 1 for mine in seen["shares"] for share in mine.values())
    assert len({tuple(mine.values()) for mine in seen["shares"]}) > 1


def test_quantiles_are_those_of_sorted_values():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(3))
    found = Histogram()
    for part in values.split(1000):
        found.add(part)
    for share in (0.1, 0.5, 0.99, 1.0):
        assert found.quantile(share) == pytest.approx(float(values.abs().quantile(share)), rel=5e-3)
    assert found.quantile(0) == -1
    coarse = Histogram()
    coarse.add(values.bfloat16())
    share = (values.bfloat16().abs().float() <= coarse.quantile(0.3)).float().mean()
    assert 0.3 <= share < 0.31  # 8 bits of fraction: several values are equal
    with pytest.raises(PartInferError, match="not finite"):
        found.add(torch.tensor([float("nan")]))


def test_commands_know_the_methods(model_folder, data_folder, text_file, tmp_path, capsys):
    out = tmp_path / "out.json"
    windows = [
        f"--dataset={text_file}",
        "--prefill_tokens=24",
        "--scored_tokens=8",
        "--limit=4",
        "--bootstrap_iters=20",
    ]
    given = [f"--model_name={model_folder}", "--device=cpu", f"--calibration={text_file}", "--calibration_tokens=512"]
    methods = "--method=dense,cats,wina_uniform"
    assert main([*given, *windows, methods, "--paper_sparsity=0.25,0.5", f"--json={out}"]) == 0
    rows = {row["label"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert len(rows) == 5
    assert rows["wina_uniform left_out=0.5"]["block_bytes_fraction"] == pytest.approx(0.5, abs=0.02)
    assert rows["cats left_out=0.5"]["ffn_bytes_fraction"] == pytest.approx(2 / 3, abs=0.05)
    assert rows["cats left_out=0.5"]["paper_sparsity"] == 0.5
    assert rows["wina_uniform left_out=0.25"]["kl_to_dense"] < rows["wina_uniform left_out=0.5"]["kl_to_dense"]
    run = [
        "--task_name=local_piqa",
        "--limit=1",
        f"--data_dir={data_folder}",
        f"--output_path={tmp_path}",
        "--bootstrap_iters=20",
    ]
    assert tasks([*given, *run, "--method=cats"]) == 0
    result = json.loads((tmp_path / "tiny-llama" / "cats" / "local_piqa.json").read_text(encoding="utf-8"))
    assert result["weights"]["decoded_tokens"] > 0
    assert result["weights"]["ffn_bytes_fraction"] < 0.8
    assert result["run"]["published"]["sparsity"] == 0.5
    with pytest.raises(SystemExit):
        speed([*given, "--method=dense,teal"])
    assert "its speed would be wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sparsity": 1.0}, "paper_sparsity must be at least 0 and below 1"),
        ({"sparsity": -0.1}, "paper_sparsity must be at least 0 and below 1"),
        ({"calibration": None}, "give --calibration FILE"),
        ({"tokens": 0}, "calibration_tokens must be at least 1"),
        ({"step": 0.0}, "teal_step must be above 0"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(PartInferError, match=message):
        PublishedSettings(**{"name": "teal", "calibration": "a.txt", **wrong})


def test_other_architectures_are_refused(tiny_checkpoints):
    loaded = load_model(tiny_checkpoints["opt"], PartInferConfig(method="dense", device="cpu"))
    with pytest.raises(PartInferError, match="not for opt"):
        attach(loaded, PublishedSettings("wina_plain"), tiny_checkpoints["opt"], 0)
