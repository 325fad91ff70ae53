"""Sparse mixtures of experts against transformers' own models, whose experts compute the formula one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.model_table import LAYERS, tiny_model
from tests.transformers_patches.model_passes import padded_prompts, passes, run
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.sparse.experts import LEAST_TOKENS, Experts

SIZE, USED = 32, 2
SETTINGS = {"method": "partinfer", "selection": "up", "compensation": "none", "loaded_neurons_percent": 1.0}
SHAPE = {"start_num": 0, "end_num": LAYERS - 1, "device": "cpu", "dtype": "float32"}
MODELS = ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "qwen2_moe", "olmoe", "qwen3_5_moe_text"]
BY_INTERMEDIATE_SIZE = ("mixtral", "granitemoe", "gpt_oss", "olmoe")  # in the config, of experts


class NaiveExperts(nn.Module):
    """transformers' experts that keep, of every decoded token, the neurons with the largest |up·x| a ‖down‖."""

    def __init__(self, experts: nn.Module, kept: int) -> None:
        super().__init__()
        self.experts, self.kept = experts, kept
        self.sequences: list[int] = []  # of each token of the pass; -1: padding
        self.prefills = True
        self.squares: dict[tuple[int, int], list[torch.Tensor]] = {}

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for token, sequence in enumerate(self.sequences):
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                act, up, down, bias = self.expert(expert, x[token])
                h = act * up
                known = self.squares.setdefault((expert, sequence), [])
                if self.prefills:
                    known.append(act.square())
                elif len(known) >= LEAST_TOKENS:
                    sums = torch.stack(known).sum(0)
                    size = ((sums + sums.mean() / len(known)) / (len(known) + 1)).sqrt()
                    scores = up.abs() * size * down.norm(dim=0)
                    h = h * (scores >= scores.topk(min(self.kept, len(scores))).values[-1])
                y[token] += weight * (down @ h + bias)
        return y

    def expert(
        self, expert: int, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | int]:
        """Both factors of an expert's activations, its output projection [H, N], and that one's bias."""
        gate_up, down = self.experts.gate_up_proj[expert], self.experts.down_proj[expert]
        if not hasattr(self.experts, "down_proj_bias"):
            gate, up = (gate_up @ x).chunk(2)
            return nn.functional.silu(gate), up, down, 0
        both = x @ gate_up + self.experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7) + 1
        return gate * torch.sigmoid(1.702 * gate), up, down.T, self.experts.down_proj_bias[expert]


def reference_logits(model, kept: int, all_passes, make=NaiveExperts) -> list[torch.Tensor]:
    mixtures = []
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            mixtures.append(make(module, kept))
            model.set_submodule(name, mixtures[-1])
    logits, past = [], None
    for number, (ids, options) in enumerate(all_passes):
        mask = options["attention_mask"][:, -ids.shape[1] :]
        sequences = [row if real else -1 for row, tokens in enumerate(mask.tolist()) for real in tokens]
        for one in mixtures:
            one.sequences, one.prefills = sequences, number == 0
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=past, use_cache=True, **options)
        past = output.past_key_values
        logits.append(output.logits)
    return logits


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("lengths", [[24], [20, 9, 1]])
@pytest.mark.parametrize("model_type", MODELS)
def test_equals_the_formula(request, tmp_path, model_type, lengths, kernels):
    if kernels == "native":
        request.getfixturevalue("native")
    model = tiny_model(model_type)
    if model_type in BY_INTERMEDIATE_SIZE:
        model.config.intermediate_size = SIZE
        model = type(model)(model.config).eval()
    model.save_pretrained(tmp_path)
    sparsity, kept = 0.6, round((3 * 0.6 * SIZE - SIZE) / 2)
    loaded = load_model(tmp_path, PartInferConfig(**SETTINGS, **SHAPE, sparsity=sparsity, kernels=kernels))
    assert loaded.plan.experts == dict.fromkeys(range(LAYERS), kept)
    all_passes = passes(*padded_prompts(lengths, "left"), [1, 1, 3])
    ours, expected = run(loaded.model, all_passes), reference_logits(model, kept, all_passes)
    real = all_passes[0][1]["attention_mask"].bool()
    assert (ours[0] - expected[0])[real].abs().max() < 1e-4
    for a, b in zip(ours[1:], expected[1:], strict=True):
        assert (a - b).abs().max() < 1e-4
    if lengths == [24]:
        assert 0.6 <= loaded.bytes_fraction() < 1  # experts that the prompt said little about are whole
        assert kept / SIZE <= loaded.computed_fraction() < 1


def test_all_neurons_are_dense(tmp_path):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, PartInferConfig(**SETTINGS, **SHAPE, sparsity=1.0))
    all_passes = passes(*padded_prompts([24], "left"), [1, 1])
    for a, b in zip(run(loaded.model, all_passes), run(model, all_passes), strict=True):
        assert (a - b).abs().max() < 1e-4
    assert (loaded.computed_fraction(), loaded.bytes_fraction()) == (1, 1)
    read = sum(m.row_bytes for m in loaded.state.experts) * USED / 6
    assert loaded.token_bytes() == pytest.approx(
        loaded.report.bytes_resident
        - loaded.model.get_input_embeddings().weight.nbytes
        - sum(m.row_bytes for m in loaded.state.experts)
        + read
    )


@pytest.mark.parametrize("settings", [{"method": "dense"}, SETTINGS | {"sparsity": 0.6}], ids=["dense", "sparse"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_call_for_each_token_is_a_call_for_each_expert(native, tmp_path, monkeypatch, model_type, settings):
    """Which of them computes a pass goes by how many tokens share an expert; nothing else may."""
    tiny_model(model_type).save_pretrained(tmp_path)
    all_passes, results = passes(*padded_prompts([20, 9, 14], "left"), [1, 1, 3]), []
    for few in (0, 1000):
        monkeypatch.setattr("transformers_patches.sparse.experts.FEW_PER_EXPERT", few)
        loaded = load_model(tmp_path, PartInferConfig(**settings, **SHAPE, kernels="native"))
        calls = []
        monkeypatch.setattr(kernels.ExpertTable, "run", counted(kernels.ExpertTable.run, calls))
        logits = run(loaded.model, all_passes)
        monkeypatch.undo()
        results.append((logits, loaded.bytes_fraction(), len(calls)))
    (grouped, read, no_calls), (by_token, same, calls) = results
    real = all_passes[0][1]["attention_mask"].bool()
    for number, (a, b) in enumerate(zip(grouped, by_token, strict=True)):
        assert ((a - b)[real] if number == 0 else a - b).abs().max() < 1e-4
    assert read == same
    prompt = real.numel() if settings["method"] == "dense" else 0  # the prompt tells sparse experts typical sizes
    assert (no_calls, calls) == (0, LAYERS * (prompt + 3 * 5))


def counted(run, calls: list):
    """The same method, which notes its calls."""
    return lambda *arguments: calls.append(1) or run(*arguments)


def test_what_experts_cannot_do_is_refused(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    settings = SETTINGS | {"loaded_neurons_percent": 0.7}
    with pytest.raises(PartInferError, match="--method dense, or --selection up --loaded_neurons_percent 1"):
        load_model(tmp_path, PartInferConfig(**settings, **SHAPE))


def test_experts_may_be_fetched_before_they_are_read(native, tmp_path):
    """Whoever keeps experts elsewhere is asked for them, and says where their rows lie then."""
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, PartInferConfig(method="dense", kernels="native", **SHAPE))
    expected = run(loaded.model, all_passes := passes(*padded_prompts([9], "left"), [1, 1]))
    asked: list[int] = []
    for module in loaded.model.modules():
        if isinstance(module, Experts):
            module.before = Fetching(module, asked)
    assert all(torch.equal(a, b) for a, b in zip(run(loaded.model, all_passes), expected, strict=True))
    assert len(asked) >= LAYERS * USED * 2


class Fetching:
    """Has the rows of experts in memory only while they are used; between, that memory holds something else."""

    def __init__(self, experts: Experts, asked: list[int]) -> None:
        self.experts, self.asked, self.present = experts, asked, []
        self.kept = [{name: rows.weight(name).clone() for name in rows.row_names} for rows in experts.rows]

    def __call__(self, numbers: list[int]) -> None:
        self.asked += numbers
        for number, weights in enumerate(self.kept):
            rows, needed = self.experts.rows[number], number in numbers
            for name, weight in weights.items():
                value = weight.clone() if needed else torch.full_like(weight, torch.nan)
                setattr(rows, name, nn.Parameter(value, requires_grad=False))
            self.experts.moved(number)
