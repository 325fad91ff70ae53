"""Core neurons of a prompt: the counts and the choice against the formula in plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.transformers_patches.masked_reference import naive_core_counts, naive_selection
from transformers_patches.kernels import core_counts
from transformers_patches.plan.load_plan import LayerPlan
from transformers_patches.sparse.prompt_evidence import most_counted


def distinct_activations(seed: int, tokens: int, neurons: int, positive: float) -> torch.Tensor:
    """[tokens, neurons], no value twice, about a part `positive` of them above 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randperm(tokens * neurons, generator=generator).float() + 0.5
    return (values - values.numel() * (1 - positive)).reshape(tokens, neurons)


@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 8),
    neurons=st.integers(1, 30),
    positive=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    alpha=st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.5, 0.7, 1.0]),
)
def test_counts_are_those_of_the_formula(seed, tokens, neurons, positive, alpha):
    h = distinct_activations(seed, tokens, neurons, positive)
    assert core_counts(h, alpha).tolist() == naive_core_counts(h.tolist(), alpha)


def test_counts_of_a_case_worked_out_by_hand():
    h = torch.tensor(
        [
            [3.0, 2.0, 1.0, -1.0, 0.0],
            [-2.0, 5.0, -1.0, 4.0, 1.0],
            [1.0, 1.5, 1.2, 0.1, 9.0],
        ]
    )
    # 3, 3 and 5 positives: their mean is 11/3, k = floor(0.6 * 11/3) = 2
    assert core_counts(h, 0.6).tolist() == [1, 3, 0, 1, 1]


def test_zero_and_negative_activations_are_never_marked():
    h = torch.tensor([[0.0, 0.0, -1.0, 0.0], [1.0, 2.0, 3.0, 4.0]])  # k = 2, the first token has no positive one
    assert core_counts(h, 1.0).tolist() == [0, 0, 1, 1]


def test_no_tokens_mark_nothing():
    assert core_counts(torch.empty(0, 4), 1.0).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_do_not_overflow(dtype):
    h = torch.ones(4000, 3, dtype=dtype) * torch.tensor([1, 2, 3], dtype=dtype)
    assert core_counts(h, 0.34).tolist() == [0, 0, 4000]


@given(data=st.data(), size=st.integers(1, 25), method=st.sampled_from(["partinfer", "coreinfer"]))
def test_the_choice_is_the_naive_one(data, size, method):
    base_ranking = data.draw(st.permutations(range(size)))
    loaded_count = data.draw(st.integers(1, size))
    base_count = 0 if method == "coreinfer" else data.draw(st.integers(1, loaded_count))
    computed = data.draw(st.integers(max(base_count, 1), loaded_count))
    others = data.draw(st.permutations(base_ranking[base_count:]))
    neurons = base_ranking[:base_count] + others[: loaded_count - base_count]
    counts = data.draw(arrays("int64", loaded_count, elements=st.integers(0, 4))).tolist()
    plan = LayerPlan(
        torch.tensor(neurons), base_count, computed, torch.tensor([base_ranking.index(n) for n in neurons])
    )

    chosen = most_counted(torch.tensor(counts), plan)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == computed - base_count
    selected = set(plan.neurons[:base_count].tolist()) | set(plan.neurons[chosen].tolist())
    by_neuron = dict(zip(neurons, counts, strict=True))
    assert selected == naive_selection(by_neuron, base_ranking, neurons[:base_count], computed)


def test_a_prompt_that_marks_nothing_gets_the_best_of_the_base_ranking():
    plan = LayerPlan(torch.tensor([9, 5, 0, 7, 2]), 1, 3, torch.tensor([0, 4, 1, 3, 2]))
    assert most_counted(torch.zeros(5, dtype=torch.int64), plan).tolist() == [2, 4]
