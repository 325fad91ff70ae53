"""frontier.py: rows that are kept and found again, speeds of separate runs put together, the table and the figure."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from evaluation import frontier
from evaluation.compared.kinds import ComparedFile
from evaluation.frontier_plot import plot_frontier
from evaluation.frontier_rows import Point, RowFile, measure_points, speed_arguments
from evaluation.methods import build_typed_grid
from transformers_patches.errors import PartInferError

FLAGS = [
    "--model_name=m",
    "--dataset=t.txt",
    "--method=dense,partinfer",
    "--sparsity=0.5,0.7",
    "--dtypes=bfloat16,int4",
]
CONDITIONS = {"model": "m", "examples": 4}
LOSSES = {"dense bfloat16": 0.0, "partinfer sparsity=0.5 int4": 0.3, "llama.cpp q4_0": 0.03}


def points() -> list[Point]:
    grid = build_typed_grid(frontier.build_parser().parse_args(FLAGS))
    found = [Point(configuration.label, configuration) for configuration in grid if configuration.label in LOSSES]
    return [*found, Point("llama.cpp q4_0", kind="q4_0")]


class Losses:
    """Stands for PerplexityRows."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def row(self, configuration) -> dict:
        return self._row(configuration.label)

    def compared_row(self, file: ComparedFile) -> dict:
        return self._row(file.label) | {"method": "llama.cpp", "settings": file.note}

    def _row(self, label: str) -> dict:
        self.asked.append(label)
        loss = LOSSES[label]
        sizes = {"block_bytes_fraction": 0.7, "token_bytes": 10**8, "weight_bytes_resident": 2 * 10**8}
        intervals = {"nll_ci": [2.9, 3.1], "excess_nll_ci": [loss - 0.01, loss + 0.01]}
        quality = {"nll": 3 + loss, "excess_nll": loss, "kl_to_dense": loss, "top1_agreement": 0.9}
        return {"label": label, "method": label.split()[0], **quality, **intervals, **sizes}


class Runs:
    """Stands for Measurement: the machine is twice as slow in every second run."""

    def __init__(self, fails_in: int | None = None) -> None:
        self.count, self.fails_in = 0, fails_in

    def rows(self, grid, with_transformers: bool, kinds: list[str]) -> list[dict]:
        self.count += 1
        if self.count == self.fails_in:
            raise KeyboardInterrupt
        slow = 1 + self.count % 2
        labels = [configuration.label for configuration in grid] + [f"llama.cpp {kind}" for kind in kinds]
        return [self._row(label, 1.0 if label.startswith("dense b") else 2.0, slow) for label in labels]

    def _row(self, label: str, gain: float, slow: int) -> dict:
        speed = {"decode_tokens_per_second": 40 * gain / slow, "speedup_over_dense": gain, "share_of_probe": 0.8}
        return {"label": label, "dtype": "x", "peak_memory_bytes": 3 * 10**8, "load_s": 1.0, **speed} | {
            "time_to_first_token_s": 0.1
        }


FILES = SimpleNamespace(file=lambda kind: ComparedFile(None, kind, "from it.gguf", 1))


def test_speeds_of_several_runs_are_put_together_by_the_dense_rows(tmp_path):
    kept, runs = RowFile(tmp_path / "f.json", CONDITIONS), Runs()
    rows = measure_points(points(), kept, Losses(), lambda: runs, FILES)
    assert [row["label"] for row in rows] == list(LOSSES)
    assert [row["dense_tokens_per_second"] for row in rows] == [20, 40, 20]
    assert [row["decode_tokens_per_second"] for row in rows] == [20, 40, 40]
    assert [row["line"] for row in rows] == ["dense bfloat16", "partinfer int4", "llama.cpp q4_0"]
    assert [row["excess_nll"] for row in rows] == list(LOSSES.values())
    assert rows[2]["note"] == "from it.gguf"


def test_a_stopped_run_goes_on_with_the_next_row(tmp_path):
    path = tmp_path / "f.json"
    stopped = Runs(fails_in=2)
    with pytest.raises(KeyboardInterrupt):
        measure_points(points(), RowFile(path, CONDITIONS), Losses(), lambda: stopped, FILES)
    losses, runs = Losses(), Runs()
    rows = measure_points(points(), RowFile(path, CONDITIONS), losses, lambda: runs, FILES)
    assert len(rows) == 3
    assert runs.count == 2
    assert losses.asked == list(LOSSES)  # the dense one again, for its logits
    losses, runs = Losses(), Runs()
    assert measure_points(points(), RowFile(path, CONDITIONS), losses, lambda: runs, FILES) == rows
    assert (losses.asked, runs.count) == ([], 0)


def test_rows_of_other_conditions_are_not_mixed(tmp_path):
    path = tmp_path / "f.json"
    measure_points(points(), RowFile(path, CONDITIONS), Losses(), Runs, FILES)
    with pytest.raises(PartInferError, match="holds other measurements"):
        RowFile(path, CONDITIONS | {"examples": 8})
    other = frontier.build_parser().parse_args([*FLAGS, "--compensation=none"])
    same_label = next(c for c in build_typed_grid(other) if c.label == "partinfer sparsity=0.5 int4")
    kept = RowFile(path, CONDITIONS)
    assert kept.find(points()[1]) is not None
    assert kept.find(Point(same_label.label, same_label)) is None


def test_the_table_and_the_figure(tmp_path):
    rows = measure_points(points(), RowFile(tmp_path / "f.json", CONDITIONS), Losses(), Runs, FILES)
    lines = frontier.table(rows).splitlines()
    assert lines[0].startswith("|  | loss, nats | tokens/s | × dense | of block bytes |")
    assert lines[4].startswith("| llama.cpp q4_0 | 0.030 [0.020, 0.040] |")
    plot_frontier(rows, "m", tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_whole_runs(tmp_path, monkeypatch, capsys, model_folder, ranking_paths):
    """...except for measuring speed, which takes processes."""
    monkeypatch.setattr("evaluation.speed.measure.Measurement", lambda *_: Runs())
    text = tmp_path / "t.txt"
    text.write_text("abc def " * 400, encoding="utf-8")
    flags = [f"--{name}={value}" for name, value in ({"start_num": 1, "end_num": 4} | ranking_paths).items()]
    flags += [f"--model_name={model_folder}", f"--dataset={text}", f"--output={tmp_path / 'out'}", "--limit=1"]
    monkeypatch.setattr(frontier, "Source", lambda *a, **k: SOURCE(*a, **k, prefill_tokens=24, scored_tokens=8))
    assert frontier.main([*flags, "--sparsity=0.5,0.6", "--quiet"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"frontier_tiny-llama.{ending}" for ending in ("json", "md", "png")}
    content = json.loads((tmp_path / "out" / "frontier_tiny-llama.json").read_text(encoding="utf-8"))
    labels = [
        "dense",
        "partinfer sparsity=0.5",
        "partinfer sparsity=0.6",
        "original sparsity=0.5",
        "original sparsity=0.6",
    ]
    assert [row["label"] for row in content["rows"]] == labels
    assert content["rows"][1]["block_bytes_fraction"] < content["rows"][2]["block_bytes_fraction"] < 1
    assert "| dense | 0.000 [0.000, 0.000] |" in capsys.readouterr().out


SOURCE = frontier.Source


@pytest.mark.parametrize("wrong", [["--method=partinfer"], ["--compare=vllm"], ["--limit=0"], ["--repetitions=0"]])
def test_wrong_usage_ends_with_2(wrong):
    with pytest.raises(SystemExit) as ended:
        frontier.main([*FLAGS, *wrong])
    assert ended.value.code == 2


def test_speed_takes_the_same_settings():
    arguments = speed_arguments(frontier.build_parser().parse_args(FLAGS))
    assert (arguments.batch_size, arguments.prompt, arguments.prompt_length, arguments.warmup) == (1, None, 128, 1)
