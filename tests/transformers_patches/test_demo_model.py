"""The real demo model in float32: equal to plain transformers where it has to be, and to a masked plain model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import random_neuron_file
from tests.transformers_patches.masked_reference import MaskedReference, NaiveMethod, positions
from tests.transformers_patches.model_passes import run, run_reference
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model

pytestmark = pytest.mark.model

TEXTS = (
    "The tallest mountain in the world is called",
    "Water boils at",
    "Bees make honey from the nectar of flowers, and",
)
ANSWER = " a hundred degrees, as every child knows."
TOLERANCE = 1e-5  # of the largest logit, which is about 30: the order of summation moves 30 layers of float32 by 7e-5


@pytest.fixture(scope="module")
def reference(demo_model):
    return MaskedReference(demo_model)


@pytest.fixture(scope="module")
def passes_over_cache(demo_model):
    """Three prompts of different lengths, padded on the left, and an answer scored over the cache."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.padding_side = "left"
    prompt = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    answer = tokenizer(ANSWER, return_tensors="pt")["input_ids"].expand(len(TEXTS), -1)
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(answer)], dim=1)
    return [
        (
            prompt["input_ids"],
            {"attention_mask": prompt["attention_mask"], "position_ids": positions(prompt["attention_mask"])},
        ),
        (answer, {"attention_mask": mask, "position_ids": positions(mask)[:, -answer.shape[1] :]}),
    ]


def real(logits: list[torch.Tensor], passes) -> torch.Tensor:
    """The logits of all tokens that are not padding."""
    mask = passes[0][1]["attention_mask"].bool()
    return torch.cat([logits[0][mask], logits[1].flatten(0, 1)])


def test_dense_is_plain_transformers_bit_for_bit(demo_model, reference, passes_over_cache):
    loaded = load_model(demo_model, PartInferConfig(method="dense", dtype="float32", device="cpu"))
    with reference.fresh():
        expected = run(reference.model, passes_over_cache)
    for ours, theirs in zip(run(loaded.model, passes_over_cache), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_all_neurons_give_plain_transformers(demo_model, reference, passes_over_cache):
    settings = PartInferConfig(
        sparsity=1.0, loaded_neurons_percent=1.0, base_neurons_percent=1.0, dtype="float32", device="cpu"
    )
    config = reference.model.config
    ranking = random_neuron_file(3, config.num_hidden_layers, config.intermediate_size)
    loaded = load_model(demo_model, settings, ranking)
    with reference.fresh():
        plain = real(run(reference.model, passes_over_cache), passes_over_cache)
        try:  # a sum's order alone moves plain transformers by 1e-4 on some processors: float64 judges both
            exact = real(run(reference.model.double(), passes_over_cache), passes_over_cache)
        finally:
            reference.model.float()
    ours = real(run(loaded.model, passes_over_cache), passes_over_cache)
    assert (ours - exact).abs().max() < 1e-4
    assert torch.equal(ours.argmax(-1), plain.argmax(-1))


@pytest.mark.parametrize("method", ["partinfer", "coreinfer"])
def test_sparse_equals_the_masked_plain_model(demo_model, reference, passes_over_cache, method):
    config = reference.model.config
    ranking = random_neuron_file(3, config.num_hidden_layers, config.intermediate_size)
    settings = PartInferConfig(method=method, use_partial_loading=True, dtype="float32", device="cpu")
    loaded = load_model(demo_model, settings, ranking)
    rows = ranking.ranking.tolist()
    naive = NaiveMethod(method, True, rows, rows, settings.resolve_layers(config.num_hidden_layers))
    expected = real(run_reference(reference, naive, passes_over_cache), passes_over_cache)
    ours = real(run(loaded.model, passes_over_cache), passes_over_cache)
    assert (ours - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert loaded.computed_fraction() == pytest.approx(0.4, abs=1e-3)
