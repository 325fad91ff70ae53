"""Evidence of a prompt: every score against its formula in plain Python, and in whole models."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.transformers_patches.made_up_files import with_statistics
from tests.transformers_patches.model_passes import DATASET, SPARSE, padded_prompts, passes, run, selection_of
from transformers_patches.config import PROMPT_SELECTIONS, PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.clusters import Clusters
from transformers_patches.plan.load_plan import LayerPlan
from transformers_patches.sparse.prior import Prior
from transformers_patches.sparse.prompt_evidence import EVIDENCE

LOADED, BASE, COMPUTED, HIDDEN = 12, 3, 7, 4


def griffin(h, mean_abs, norms, places):
    def length(token):
        return math.sqrt(sum(v * v for v in token))

    return [math.sqrt(sum((token[i] / length(token)) ** 2 for token in h)) for i in range(LOADED)]


def blend(h, mean_abs, norms, places):
    return [norms[i] * (sum(abs(token[i]) for token in h) + 256 * mean_abs[i]) / (len(h) + 256) for i in range(LOADED)]


def glass(h, mean_abs, norms, places):
    local = [sum(abs(token[i]) / math.sqrt(sum(v * v for v in token)) for token in h) for i in range(LOADED)]
    rank = {neuron: place for place, neuron in enumerate(sorted(range(LOADED), key=lambda i: -local[i]))}
    prior = {neuron: place for place, neuron in enumerate(sorted(range(LOADED), key=lambda i: places[i]))}
    return [-(rank[i] + prior[i]) / 2 for i in range(LOADED)]


FORMULAS = {"griffin": griffin, "blend": blend, "glass": glass}


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 6), name=st.sampled_from(list(FORMULAS)))
def test_the_choice_is_that_of_the_formula(seed, tokens, name):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, LOADED, generator=generator)
    mean_abs, down = torch.rand(LOADED, generator=generator), torch.randn(LOADED, HIDDEN, generator=generator)
    places = torch.randperm(30, generator=generator)[:LOADED]
    plan = LayerPlan(torch.arange(LOADED), BASE, COMPUTED, places)
    evidence = EVIDENCE[name](plan, Prior(mean_abs), down, torch.device("cpu"), 0.2)
    for part in h.split(2):  # evidence may come in pieces
        evidence.observe(part)
    norms = [math.sqrt(sum(v * v for v in row)) for row in down.double().tolist()]
    scores = FORMULAS[name](h.double().tolist(), mean_abs.double().tolist(), norms, places.tolist())
    others = sorted(range(BASE, LOADED), key=lambda i: (-round(scores[i], 5), places[i]))
    assert evidence.choose().tolist() == sorted(others[: COMPUTED - BASE])


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 6), loaded=st.integers(COMPUTED, LOADED))
def test_similarity_takes_the_neurons_of_the_nearest_cluster(seed, tokens, loaded):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, loaded, generator=generator)
    known = Clusters(
        torch.randn(3, 5, LOADED, generator=generator).half(),
        torch.randint(0, 4, (3, 5, LOADED), generator=generator).int(),
    )
    neurons = torch.randperm(LOADED, generator=generator)[:loaded]
    plan = LayerPlan(neurons, BASE, COMPUTED, torch.randperm(30, generator=generator)[:loaded])
    prior = Prior().with_clusters(plan, 2, known)
    evidence = EVIDENCE["similarity"](plan, prior, torch.zeros(loaded, HIDDEN), torch.device("cpu"), 0.2)
    for part in h.split(2):
        evidence.observe(part)

    def cosine(center):
        a, b = [sum(token[i] / math.hypot(*token) for token in h.tolist()) for i in range(loaded)], center.tolist()
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    nearest = max(range(3), key=lambda cluster: cosine(known.centers[cluster, 2, neurons].float()))
    counts = known.counts[nearest, 2, neurons].tolist()
    others = sorted(range(BASE, loaded), key=lambda i: (-counts[i], int(plan.priority[i])))
    assert evidence.choose().tolist() == sorted(others[: COMPUTED - BASE])


def test_similarity_needs_clusters(tiny_checkpoints):
    settings = PartInferConfig(selection="similarity", start_num=1, end_num=4, device="cpu")
    with pytest.raises(PartInferError, match="needs clusters of texts, but .* has none: .*profiler cluster"):
        load_model(tiny_checkpoints["llama"], settings, with_statistics(3))


def test_a_long_prompt_outweighs_the_prior():
    plan = LayerPlan(torch.arange(2), 0, 1, torch.arange(2))
    for tokens, expected in ((10, 0), (1000, 1)):
        evidence = EVIDENCE["blend"](plan, Prior(torch.tensor([1.0, 0.0])), torch.eye(2), torch.device("cpu"), 0.2)
        evidence.observe(torch.tensor([[0.0, 1.0]]).expand(tokens, 2))
        assert evidence.choose().tolist() == [expected]


@pytest.mark.parametrize("selection", PROMPT_SELECTIONS)
def test_a_sequence_chooses_alone(selection, loaded, tiny_checkpoints):
    """Neither padding nor the rest of the batch changes a sequence's choice; exactly phi N neurons are computed."""
    ours = loaded("llama", "partinfer", selection=selection)
    ids, mask = padded_prompts([7, 3, 5], "left")
    ours.reset_counters()
    run(ours.model, passes(ids, mask, [1]))
    together = {layer: selection_of(ours, layer, 3) for layer in SPARSE}
    assert {len(chosen) for layer in SPARSE for chosen in together[layer]} == {32}
    assert ours.bytes_fraction() == ours.computed_fraction() == pytest.approx(0.4)
    for row, length in enumerate([7, 3, 5]):
        run(ours.model, passes(ids[row : row + 1, -length:], mask[row : row + 1, -length:], [1]))
        assert all(selection_of(ours, layer, 1)[0] == together[layer][row] for layer in SPARSE)


def test_griffin_over_all_neurons(tiny_checkpoints):
    settings = PartInferConfig(
        method="coreinfer", selection="griffin", start_num=1, end_num=4, dtype="float32", device="cpu"
    )
    ours = load_model(tiny_checkpoints["mistral"], settings, DATASET)
    run(ours.model, passes(*padded_prompts([6], "left"), [1]))
    assert all(len(selection_of(ours, layer, 1)[0]) == 32 for layer in SPARSE)
    assert ours.plan.loaded_fraction == 1


def test_statistics_reach_the_layers(tiny_checkpoints):
    neurons = with_statistics(3)
    settings = PartInferConfig(selection="blend", start_num=1, end_num=4, dtype="float32", device="cpu")
    ours = load_model(tiny_checkpoints["llama"], settings, neurons)
    for (layer, plan), module in zip(ours.plan.layers.items(), ours.state.layers, strict=True):
        assert torch.equal(module.selection.prior.mean_abs, neurons.statistics["mean_abs"][layer][plan.neurons])
        norms = module.selection.prior.down_norm(module.rows.down)
        assert torch.allclose(norms, module.rows.down.norm(dim=1))
