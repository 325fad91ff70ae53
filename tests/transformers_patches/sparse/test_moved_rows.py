"""Rows that are moved for use: their order, with a stand-in for the GPU's copies that writes down what happens."""

from __future__ import annotations

import pytest
import torch

from tests.transformers_patches.model_passes import DATASET, MODEL, padded_prompts, passes, run
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model
from transformers_patches.sparse.moved_rows import MovedRows, Transfers


class Log:
    """Copies that are complete at once. `lines`: what was started and taken, with numbers of neurons."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def gather(self, weight, index):
        return weight.index_select(0, index)

    def start(self, rows):
        count = len(self.lines)
        self.lines.append(f"start {len(rows['down'])}")
        return _Copied({name: weight.clone() for name, weight in rows.items()}, self, count)


class _Copied:
    def __init__(self, rows, log: Log, number: int) -> None:
        self.rows, self.log, self.number = rows, log, number

    def take(self):
        self.log.lines.append(f"take what line {self.number} started")
        return self.rows


def moved(loaded) -> Log:
    """The same model with rows that are moved, and the log of that."""
    log = Log()
    transfers = Transfers(log)
    for layer in loaded.state.layers:
        layer.rows.__class__ = MovedRows
        layer.rows.join(transfers)
    return log


@pytest.fixture
def load(tiny_checkpoints):
    def loaded(family="llama", **settings):
        config = PartInferConfig(method="partinfer", start_num=1, end_num=3, dtype="float32", device="cpu", **settings)
        return load_model(tiny_checkpoints[family], config, DATASET, MODEL)

    return loaded


@pytest.mark.parametrize("family", ["llama-mlp-bias", "opt"])
def test_logits_are_the_same(load, family):
    plain, ours = load(family, selection="core"), load(family, selection="core")
    moved(ours)
    all_passes = passes(*padded_prompts([5, 2], "left"), [1, 1, 2])
    for _ in range(2):
        pairs = zip(run(ours.model, all_passes), run(plain.model, all_passes), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_next_layer_s_rows_move_while_a_layer_computes(load):
    loaded = load(selection="core")
    log = moved(loaded)
    with torch.inference_mode():
        cache = loaded.model(torch.arange(3, 9)[None], use_cache=True).past_key_values
        assert log.lines == [
            "start 56",  # the first sparse layer's
            "start 56",  # the second one's, before the first one's are taken
            "take what line 0 started",
            "start 56",
            "take what line 1 started",
            "take what line 3 started",
        ]
        log.lines.clear()
        loaded.model(torch.tensor([[7]]), past_key_values=cache)
        once = len(log.lines)
        assert {line for line in log.lines if line.startswith("start")} == {
            "start 24",
            "start 8",
        }  # base, and the prompt's
        loaded.model(torch.tensor([[8]]), past_key_values=cache)
        assert len(log.lines) == once  # they stay


def test_rows_that_nobody_took_are_dropped(load):
    """As after Ctrl-C: the next prompt begins with the first layer again."""
    log = moved(loaded := load(selection="core"))
    rows = [layer.rows for layer in loaded.state.layers]
    first = rows[0].all(torch.device("cpu"))
    again = rows[0].all(torch.device("cpu"))
    assert torch.equal(first["down"], again["down"])
    assert log.lines.count("start 56") == 4  # two layers, twice
    assert rows[0].transfers._ahead[0] is rows[1]


@pytest.mark.cuda
def test_copies_to_a_gpu_arrive(load):
    from transformers_patches.sparse.moved_rows import CudaCopies

    copies = CudaCopies(torch.device("cuda"))
    rows = {"down": torch.randn(4000, 1024).pin_memory()}
    for _ in range(5):
        assert torch.equal(copies.start(rows).take()["down"].cpu(), rows["down"])
    index = torch.randperm(4000)[:700]
    gathered = {"down": copies.gather(rows["down"], index)}
    assert torch.equal(copies.start(gathered).take()["down"].cpu(), rows["down"][index])
