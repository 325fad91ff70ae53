"""Scores from statistics, and files that are ranked again and merged."""

from __future__ import annotations

import pytest
import torch

from profiler.merging import merge
from profiler.ranking import SCORES, down_norms, rank, score_neurons
from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.neurons.neuron_file import ACTIVATION_STATISTICS, NeuronFile

LAYERS, SIZE = 2, 10


def statistics_of(h: torch.Tensor, down_norm: torch.Tensor) -> dict[str, torch.Tensor]:
    normalized = torch.nn.functional.normalize(h, dim=-1)
    values = (h.abs(), h, h**2, normalized.abs(), normalized, normalized**2)
    means = {name: v.mean(1) for name, v in zip(ACTIVATION_STATISTICS, values, strict=True)}
    return {**means, "down_norm": down_norm}


def activations(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(LAYERS, tokens, SIZE, generator=torch.Generator().manual_seed(seed)) + 0.5


DOWN = torch.rand(LAYERS, SIZE, generator=torch.Generator().manual_seed(9)) + 0.1


@pytest.mark.parametrize(
    ("score", "formula"),
    [
        ("mean_abs", lambda h: h.abs().mean(1)),
        ("rms", lambda h: h.square().mean(1).sqrt()),
        ("griffin", lambda h: (h / h.norm(dim=-1, keepdim=True)).norm(dim=1) / h.shape[1] ** 0.5),
        ("mean_abs_down", lambda h: h.abs().mean(1) * DOWN),
        ("rms_down", lambda h: h.square().mean(1).sqrt() * DOWN),
        ("griffin_down", lambda h: (h / h.norm(dim=-1, keepdim=True)).norm(dim=1) / h.shape[1] ** 0.5 * DOWN),
        ("std_down", lambda h: h.std(1, correction=0) * DOWN),
    ],
)
def test_scores_are_what_their_formulas_give(score, formula):
    h = activations(50, seed=0)
    torch.testing.assert_close(score_neurons(statistics_of(h, DOWN), score), formula(h))


def test_every_score_is_tested_and_others_are_refused():
    with pytest.raises(PartInferError, match="mean_abs, rms"):
        score_neurons({}, "best")
    with pytest.raises(PartInferError, match="has no statistic 'down_norm'"):
        score_neurons({"mean_abs": DOWN}, "mean_abs_down")
    assert len(SCORES) == 7


def test_down_norms_are_those_of_columns(checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    weight = family_of(model.config).down_projection(model, 1).weight
    torch.testing.assert_close(down_norms(model)[1], weight.detach().norm(dim=0))


def test_down_norms_of_offloaded_weights(tiny_checkpoints):
    from accelerate import cpu_offload
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints["llama"])
    expected = down_norms(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert family_of(model.config).down_projection(model, 0).weight.is_meta
    assert torch.equal(down_norms(model), expected)


def file_of(tokens: int, seed: int, **metadata: str) -> NeuronFile:
    given = {"fingerprint": "f", "tokens": str(tokens), "texts": "1", "dataset": f"d{seed}", **metadata}
    return rank(statistics_of(activations(tokens, seed), DOWN), "mean_abs", given)


def test_merged_data_sets_weigh_the_same_whatever_their_tokens():
    small, large = file_of(5, 1), file_of(500, 2)
    merged = merge([small, large], "mean_abs", "translate")
    expected = (small.statistics["mean_abs"] + large.statistics["mean_abs"]) / 2
    torch.testing.assert_close(merged.scores, expected)
    assert merged.tokens == 505
    assert merged.metadata["dataset"] == "d1 + d2"


def test_merging_in_steps_is_merging_at_once():
    a, b, c = (file_of(20, seed) for seed in (1, 2, 3))
    for value, file in enumerate((a, b, c)):
        file.input_squares = {"ffn": torch.full((LAYERS, 4), float(value)), "head": torch.full((1, 4), float(value))}
    steps = merge([merge([a, b], "rms", "x"), c], "rms", "y")
    at_once = merge([a, b, c], "rms", "y")
    torch.testing.assert_close(steps.scores, at_once.scores)
    for merged in (steps, at_once):
        torch.testing.assert_close(merged.input_squares["ffn"], torch.ones(LAYERS, 4))
        torch.testing.assert_close(merged.input_squares["head"], torch.ones(1, 4))
    del b.input_squares["head"]
    assert set(merge([a, b], "rms", "x").input_squares) == {"ffn"}  # what not all have is left out


def test_files_without_statistics_or_of_another_model_are_not_merged():
    with pytest.raises(PartInferError, match="has no statistics"):
        merge([file_of(5, 1), NeuronFile(file_of(5, 1).ranking)], "mean_abs", "x")
    with pytest.raises(PartInferError, match="merge files of one model"):
        merge([file_of(5, 1), file_of(5, 2, fingerprint="g")], "mean_abs", "x")
