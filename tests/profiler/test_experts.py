"""Statistics of experts: against a loop over tokens, in files, merged, and shown."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from profiler.__main__ import main
from profiler.collect import Collector
from profiler.experts import expert_neurons, experts_of
from tests.model_table import LAYERS, tiny_model
from tests.profiler.byte_tokenizer import END, byte_tokenizer
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.expert_neurons import LEAST_TOKENS
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.max_loss import UNMEASURED
from transformers_patches.plan.neuron_files import settings_for

COUNT, SIZE = 6, 32
TEXTS = [[5, 9, 33, 21, 70, 11, 12], [7], [4, 90, 3, 8]]


@torch.no_grad()
def naive(model, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [L, E] and sums of abs(h) and h² [L, E, 2, N], one text and one token at a time."""
    tokens, sums = torch.zeros(LAYERS, COUNT), torch.zeros(LAYERS, COUNT, 2, SIZE)

    def watch(layer):
        def hook(module: nn.Module, args) -> None:
            for x, chosen in zip(args[0], args[1].tolist(), strict=True):
                for expert in chosen:
                    gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
                    h = nn.functional.silu(gate) * up
                    tokens[layer, expert] += 1
                    sums[layer, expert] += torch.stack([h.abs(), h.square()])

        return hook

    handles = [experts_of(model, layer).register_forward_pre_hook(watch(layer)) for layer in range(LAYERS)]
    for text in texts:
        model(torch.tensor([text]))
    for handle in handles:
        handle.remove()
    return tokens, sums


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe"])
def test_tokens_and_means_are_those_of_a_loop(model_type):
    model = tiny_model(model_type)
    if model_type == "glm4_moe":
        model = tiny_model(model_type, {"first_k_dense_replace": 0, "n_shared_experts": 1})
    collector = Collector.of(model, 0)
    assert collector.observe(TEXTS) == 12
    collector.statistics.commit(12)
    found, (tokens, sums) = expert_neurons(model, collector.statistics), naive(model, TEXTS)
    assert torch.equal(found.tokens, tokens.long())
    assert int(found.tokens.sum()) == 12 * 2 * LAYERS
    used = tokens > 0
    means = sums[used] / tokens[used][:, None, None]
    torch.testing.assert_close(found.statistics["mean_abs"][used].float(), means[:, 0], rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(found.statistics["rms"][used].float(), means[:, 1].sqrt(), rtol=2e-3, atol=1e-5)
    norms = experts_of(model, 1).down_proj.norm(dim=1)
    torch.testing.assert_close(found.statistics["down_norm"][1].float(), norms, rtol=2e-3, atol=1e-5)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-mixture"
    tiny_model("qwen3_moe", {"vocab_size": 258, "eos_token_id": END}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def profile(mixture, folder, name: str, text: str) -> NeuronFile:
    (folder / f"{name}.txt").write_text(text)
    given = ["run", "--checkpoint_path", str(mixture), "--dataset", str(folder / f"{name}.txt"), "--device", "cpu"]
    more = [
        "--task_type",
        "text",
        "--max_new_tokens",
        "0",
        "--max_length",
        "64",
        "--quiet",
        "--output",
        str(folder / name),
    ]
    assert main([*given, *more]) == 0
    return NeuronFile.load(folder / name)


def test_a_profile_is_written_merged_shown_and_loaded_by(mixture, tmp_path, capsys):
    first = profile(mixture, tmp_path, "first.safetensors", "The quick brown fox.")
    assert f"of {LAYERS * COUNT} experts saw fewer than {LEAST_TOKENS} tokens" in capsys.readouterr().out
    second = profile(mixture, tmp_path, "second.safetensors", "Jumps over it, 12345 times! " * 9)
    assert (first.intermediate_size, first.experts.shape) == (0, (LAYERS, COUNT, SIZE))
    values = 3 * LAYERS * COUNT * SIZE * 2
    assert (tmp_path / "first.safetensors").stat().st_size < values + 10_000  # three numbers of 16 bits for a neuron
    paths = [str(tmp_path / name) for name in ("first.safetensors", "second.safetensors")]
    merged_path = tmp_path / "merged.safetensors"
    assert main(["merge", *paths, "--output", str(merged_path)]) == 0
    merged = NeuronFile.load(merged_path)
    assert torch.equal(merged.experts.tokens, first.experts.tokens + second.experts.tokens)
    uses = [file.experts.tokens.double() / file.tokens for file in (first, second)]
    means = [file.experts.statistics["mean_abs"].double() for file in (first, second)]
    expected = sum(u[..., None] * m for u, m in zip(uses, means, strict=True)) / sum(uses).clamp(min=1e-9)[..., None]
    torch.testing.assert_close(merged.experts.statistics["mean_abs"].double(), expected, rtol=2e-3, atol=1e-6)
    capsys.readouterr()
    assert main(["show", str(merged_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["experts"]
    assert (shown["experts"], shown["neurons"], len(shown["layers"])) == (COUNT, SIZE, LAYERS)
    assert shown["layers"][0]["most_tokens"] == int(merged.experts.tokens[0].max())
    assert main(["rank", str(merged_path), "--score", "rms_down", "--output", str(tmp_path / "again.safetensors")]) == 0
    again = NeuronFile.load(tmp_path / "again.safetensors")
    assert torch.equal(again.experts.tokens, merged.experts.tokens)
    for refused in (["compare", str(merged_path)], ["convert"]):
        assert main([*refused, str(merged_path), *([str(tmp_path / "it.json")] if refused == ["convert"] else [])]) == 1
        assert "nothing but experts" in capsys.readouterr().err
    default = settings_for(mixture, {"dataset_neurons_filepath": str(merged_path)}, None)
    assert (default.loaded_neurons_percent, default.sparsity) == (1.0, UNMEASURED)
    settings = PartInferConfig(
        method="dense",
        use_partial_loading=True,
        loaded_neurons_percent=0.5,
        start_num=0,
        end_num=LAYERS - 1,
        device="cpu",
    )
    assert load_model(mixture, settings, again).plan.loaded_fraction == pytest.approx(0.5)
