"""SparseFFN in whole models: equal to plain transformers whose FFN activations are masked to the same neurons."""

import pytest
import torch

from tests.conftest import FAMILIES, HIDDEN, INTERMEDIATE, LAYERS
from tests.transformers_patches.masked_reference import naive_count
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
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model
from transformers_patches.sparse.neuron_rows import NeuronRows

# sequences of these lengths, padded on one side to the longest
LENGTHS = {"one sequence": [7], "left": [7, 3, 1], "right": [5, 9, 2], "one token": [1]}


@pytest.mark.parametrize("padding", LENGTHS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_masked_plain_model(family, method, padding, loaded, references):
    input_ids, attention_mask = padded_prompts(LENGTHS[padding], padding)
    formula = naive(method)
    all_passes = passes(input_ids, attention_mask, [1, 1, 3])  # step by step, then several tokens in one pass
    expected = run_reference(references(family), formula, all_passes)
    ours = loaded(family, method)
    assert_equal_where_real(run(ours.model, all_passes), expected, attention_mask)
    for layer in SPARSE:
        assert selection_of(ours, layer, len(input_ids)) == formula.selected[layer]


def test_the_masks_make_a_difference(references):
    """The comparison above can fail: other neurons give other logits."""
    all_passes = passes(*padded_prompts([7, 3, 1], "left"), [1, 1])
    partinfer, coreinfer = (
        run_reference(references("llama"), naive(method), all_passes) for method in ("partinfer", "coreinfer+partial")
    )
    assert torch.equal(partinfer[0], coreinfer[0])  # both prefill with what is loaded
    assert (partinfer[1] - coreinfer[1]).abs().max() > 1e-2
    shuffled = naive("partinfer")
    shuffled.base_ranking = [row[::-1] for row in shuffled.base_ranking]
    other = run_reference(references("llama"), shuffled, all_passes)
    assert (partinfer[0] - other[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings, formula",
    [
        ({"token_sparsity": 0.01}, {"alpha": 0.01}),  # no token marks anything: the base ranking fills up
        ({"token_sparsity": 1.0}, {"alpha": 1.0}),
        ({"sparsity": 0.3}, {"phi": 0.3}),  # nothing to select beside the base
        ({"sparsity": 0.7}, {"phi": 0.7}),  # all that is loaded
        ({"base_neurons_percent": 0.0}, {"delta": 0.0}),
        (
            {"sparsity": 0.0, "base_neurons_percent": 0.0, "loaded_neurons_percent": 0.0},
            {"phi": 0, "delta": 0, "gamma": 0},
        ),
    ],
)
@pytest.mark.parametrize("method", ["partinfer", "coreinfer+partial"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_extreme_fractions_equal_the_masked_plain_model(family, method, settings, formula, loaded, references):
    input_ids, attention_mask = padded_prompts([6, 2, 4], "left", seed=3)
    all_passes = passes(input_ids, attention_mask, [1, 2])
    expected = run_reference(references(family), naive(method, **formula), all_passes)
    assert_equal_where_real(run(loaded(family, method, **settings).model, all_passes), expected, attention_mask)


def test_the_model_ranking_can_be_the_base(loaded, references):
    all_passes = passes(*padded_prompts([6, 2, 4], "right", seed=4), [1, 1])
    formula = naive("partinfer")
    formula.base_ranking, formula.other_ranking = formula.other_ranking, formula.base_ranking
    expected = run_reference(references("qwen2"), formula, all_passes)
    ours = run(loaded("qwen2", "partinfer", base_neurons_type="model").model, all_passes)
    assert_equal_where_real(ours, expected, all_passes[0][1]["attention_mask"])


ALL = {"sparsity": 1.0, "loaded_neurons_percent": 1.0, "base_neurons_percent": 1.0}


@pytest.mark.parametrize("method, settings", [("partinfer", ALL), ("coreinfer", {"sparsity": 1.0})])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_neurons_give_plain_transformers(family, method, settings, loaded, references):
    ours, plain = loaded(family, method, **settings).model, references(family).model
    input_ids, attention_mask = padded_prompts([7, 3, 1], "left")
    all_passes = passes(input_ids, attention_mask, [1, 1, 2])
    with references(family).fresh():
        references(family)._batch = 3
        expected = run(plain, all_passes)
        for a, b in zip(run(ours, all_passes), expected, strict=True):
            assert (a - b).abs().max() < 1e-4
        options = {"attention_mask": attention_mask, "max_new_tokens": 5, "do_sample": False}
        tokens = ours.generate(input_ids, **options)
        assert tokens.shape[1] > input_ids.shape[1]
        assert torch.equal(tokens, plain.generate(input_ids, **options))


# 0.4, 0.35 and 0.51875 of 80 are 32, 28, and 41.5 neurons, which rounds to 42
@pytest.mark.parametrize(
    "method, sparsity",
    [("partinfer", 0.4), ("partinfer", 0.35), ("partinfer", 0.51875), ("coreinfer", 0.4), ("coreinfer+partial", 0.4)],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_exactly_the_planned_neurons_are_computed(family, method, sparsity, loaded):
    ours = loaded(family, method, sparsity=sparsity)
    expected, prefilled = naive_count(sparsity, INTERMEDIATE), INTERMEDIATE if method == "coreinfer" else 56
    for lengths in ([7], [7, 3, 1]):
        ours.reset_counters()
        all_passes = passes(*padded_prompts(lengths, "left"), [1, 1, 3])
        prefill, *decode = computed_rows(ours, all_passes)
        assert prefill == dict.fromkeys(SPARSE, prefilled)
        assert decode == [dict.fromkeys(SPARSE, expected)] * 3
        tokens = 5 * len(lengths)
        assert {layer.counters.tokens for layer in ours.state.layers} == {tokens}
        assert {layer.counters.neurons for layer in ours.state.layers} == {tokens * expected}
        assert ours.computed_fraction() == pytest.approx(expected / INTERMEDIATE)
    assert expected == {0.4: 32, 0.35: 28, 0.51875: 42}[sparsity]


def test_dense_with_partial_loading_computes_what_is_loaded(loaded):
    ours = loaded("llama", "dense+partial")
    ours.reset_counters()
    prefill, *decode = computed_rows(ours, passes(*padded_prompts([4, 2], "right"), [1, 2]))
    assert [prefill, *decode] == [dict.fromkeys(SPARSE, 56)] * 3
    assert ours.computed_fraction() == ours.plan.loaded_fraction == 0.7


def test_layers_outside_the_range_stay_plain(loaded):
    model = loaded("llama", "partinfer").model
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert kinds == ["LlamaMLP"] + ["SparseFFN"] * 4 + ["LlamaMLP"]
    assert len(kinds) == LAYERS


def test_decoding_without_a_prompt_is_an_error(loaded):
    ours = loaded("llama", "partinfer")
    ours.state.reset()
    ours.state.begin_pass(1, 1, 0, None)
    ours.state.phase = "decode"
    with pytest.raises(RuntimeError, match="decoding without a prefilled prompt"):
        ours.state.layers[0](torch.zeros(1, 1, HIDDEN))


@pytest.fixture
def moved_rows(monkeypatch):
    """Stands in for a GPU: every row that goes to it is a copy, and is counted."""
    moved = []

    def copy(rows, device):
        moved.append(len(rows["down"]))
        return {name: weights.clone() for name, weights in rows.items()}

    monkeypatch.setattr(NeuronRows, "_on_device", staticmethod(copy))
    return moved


@pytest.mark.parametrize("family", ["llama-mlp-bias", "opt"])
@pytest.mark.parametrize("method", ["partinfer", "coreinfer", "coreinfer+partial"])
def test_with_memory_limit_only_active_neurons_are_moved_once_per_prompt(family, method, tiny_checkpoints, request):
    config = PartInferConfig(**METHODS[method], start_num=1, end_num=4, dtype="float32", device="cpu")
    ours = load_model(tiny_checkpoints[family], config, DATASET, MODEL)
    all_passes = passes(*padded_prompts([5, 2], "left"), [1, 1, 2])
    expected = run(ours.model, all_passes)

    ours = load_model(tiny_checkpoints[family], config, DATASET, MODEL)
    moved = request.getfixturevalue("moved_rows")
    base, chosen, everything = (24, 8, 56) if method == "partinfer" else (0, 32, 80 if method == "coreinfer" else 56)
    logits = []
    for request_number in range(2):
        past, seen = None, []
        for input_ids, kwargs in all_passes:
            moved.clear()
            with torch.no_grad():
                output = ours.model(input_ids=input_ids, past_key_values=past, use_cache=True, **kwargs)
            past = output.past_key_values
            logits.append(output.logits)
            seen.append(sum(moved))
        kept = 0 if request_number else base  # the base neurons of a model never change
        assert seen == [4 * everything, 4 * (kept + 2 * chosen), 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(logits, expected * 2, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("memory_limit", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_gives_the_logits_of_the_cpu(family, memory_limit, tiny_checkpoints, loaded):
    settings = {"memory_limit": memory_limit, "device": "cuda", "dtype": "float32", "start_num": 1, "end_num": 4}
    ours = load_model(tiny_checkpoints[family], PartInferConfig(**settings), DATASET, MODEL)
    kinds = {module.rows.down.device.type for module in ours.state.layers}
    assert kinds == {"cpu" if memory_limit else "cuda"}
    all_passes = passes(*padded_prompts([5, 2], "left"), [1, 1, 2])
    on_gpu = [(ids.cuda(), {name: value.cuda() for name, value in kwargs.items()}) for ids, kwargs in all_passes]
    expected = run(loaded(family, "partinfer").model, all_passes)
    for a, b in zip(run(ours.model, on_gpu), expected, strict=True):
        assert (a.cpu() - b).abs().max() < 1e-3
