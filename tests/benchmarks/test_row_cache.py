"""Rules for what stays in memory, on choices that are made up; and a trace of a tiny model."""

from __future__ import annotations

import pytest
import torch

from benchmarks.row_cache import RULES, Trace, best, hit_rate, main, rows_of, traced

# four rows, room for two; every token chooses one
CHOSEN = torch.eye(4, dtype=torch.bool)[[0, 2, 3, 2, 1, 2]]
FIRST = torch.tensor([3.0, 2.0, 1.0, 0.0])  # rows 0 and 1 are there first


@pytest.mark.parametrize(
    "rule, hits",
    [
        ("never changed", 2),  # 0 and 1
        ("least recently used", 3),  # 0; 2 takes 1's place, 3 takes 0's; 2; 1 takes 3's; 2
        ("the best possible", 4),  # 0; 2 takes 0's place, which is not needed again; 3 takes none; 2, 1, 2
    ],
)
def test_hits_by_hand(rule, hits):
    assert hit_rate(CHOSEN, FIRST, 2, RULES[rule]) == hits / 6


def test_no_rule_is_better_than_the_best_possible():
    torch.manual_seed(0)
    chosen = torch.rand(40, 30) < torch.linspace(0.1, 0.8, 30)
    rates = {name: hit_rate(chosen, torch.arange(30.0), 10, rule) for name, rule in RULES.items()}
    assert max(rates, key=rates.get) == "the best possible"
    assert rates["fading counts"] > 10 / 30  # better than any ten rows


def test_room_for_everything_finds_everything():
    assert all(hit_rate(CHOSEN, FIRST, 4, rule) == 1 for rule in RULES.values())


def test_the_best_of_each_row():
    assert best(torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 4.0]]), 2).tolist() == [[False, True, True], [True, False, True]]


def test_a_models_own_choices(tiny_checkpoints):
    trace = traced(tiny_checkpoints["llama"], [[3, 4, 5, 6], [7, 8, 9, 10]], 5, 0.7)
    kept = trace.chosen[0][0].sum(1)
    assert len(trace.chosen) == 2
    assert len(trace.chosen[0]) > 1
    assert (kept == kept[0]).all()
    assert 0 < kept[0] < trace.chosen[0][0].shape[1]
    assert all(0 < recall <= 1 for recall in trace.recall)
    rows = rows_of(Trace(trace.chosen), [0.5])
    assert [row["rule"] for row in rows] == list(RULES)


def test_models_of_another_kind_are_refused(tiny_checkpoints):
    with pytest.raises(Exception, match="expected layers of Llama's kind"):
        traced(tiny_checkpoints["opt"], [[3, 4, 5, 6]], 2, 0.7)


def test_one_prompt_is_too_few():
    with pytest.raises(Exception, match="expected 2 or more, got 1"):
        main(["--prompts", "1"])
