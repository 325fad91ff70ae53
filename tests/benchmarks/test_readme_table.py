"""The README's table from made-up rows of the scripts."""

from __future__ import annotations

import pytest

from benchmarks import readme_table
from benchmarks.readme_table import BEGIN, END, Line, caption, lines, replaced, table
from evaluation.methods import build_grid
from transformers_patches.errors import PartInferError


def speed_row(method: str, label: str, speed: float, megabytes: float) -> dict:
    return {
        "method": method,
        "label": label,
        "dtype": "bfloat16",
        "decode_tokens_per_second": speed,
        "weight_bytes_resident": round(megabytes * 1e6),
    }


SPEED = [
    speed_row("dense", "dense", 121.8, 269),
    speed_row("partinfer", "partinfer", 135.2, 269),
    speed_row("original", "original", 157.8, 229),
    speed_row("transformers", "transformers", 27.1, 269),
    speed_row("transformers", "transformers best", 46.64, 269),
    speed_row("llama.cpp", "llama.cpp bfloat16", 104.2, 269.4),
]
QUALITY = [
    {"method": "dense", "label": "dense", "nll": 3.1, "excess_nll": 0.0},
    {"method": "partinfer", "label": "partinfer", "nll": 3.105, "excess_nll": 0.005},
    {"method": "original", "label": "original", "nll": 3.666, "excess_nll": 0.566},
    {"method": "llama.cpp", "label": "llama.cpp bfloat16", "nll": 3.1021, "excess_nll": 0.0021},
]


def test_each_way_to_run_gets_its_own_line():
    assert table(lines(SPEED, QUALITY)).splitlines() == [
        "| | tokens/s | MB of weights | loss, nats/token |",
        "|---|---|---|---|",
        "| transformers, at its best | 46.6 | 269 | – |",
        "| llama.cpp | 104 | 269 | 0.002 |",
        "| `--method dense` | 122 | 269 | 0.000 |",
        "| `partinfer`, the default | 135 | 269 | 0.005 |",
        "| the original's method | 158 | 229 | 0.566 |",
    ]


def test_without_llama_cpp_its_line_is_left_out():
    names = [line.name for line in lines(SPEED[:-1], QUALITY[:-1])]
    assert len(names) == 4
    assert not any("llama" in name for name in names)


def test_a_missing_row_is_an_error_that_names_it():
    with pytest.raises(PartInferError, match="no row of original among"):
        lines(SPEED, [QUALITY[0], QUALITY[1], QUALITY[3]])


def test_small_negative_losses_are_zero():
    assert table([Line("x", 5.229, 10**6, -0.0001)]).splitlines()[-1] == "| x | 5.23 | 1 | 0.000 |"
    assert table([Line("x", 5.229, 10**6, -0.02)]).splitlines()[-1] == "| x | 5.23 | 1 | -0.020 |"


def test_only_what_is_between_the_markers_is_replaced():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = replaced(text, "new")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert replaced(once, "new") == once


@pytest.mark.parametrize("text", ["no markers", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_without_one_pair_of_markers_nothing_is_replaced(text):
    with pytest.raises(PartInferError, match="expected one"):
        replaced(text, "new")


def test_a_file_without_markers_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(readme_table.subprocess, "run", lambda *_, **__: pytest.fail("something ran"))
    path = tmp_path / "README.md"
    path.write_text("no markers", encoding="utf-8")
    with pytest.raises(PartInferError, match="expected one"):
        readme_table.main(["--dataset", "text.txt", "--update", str(path)])
    assert path.read_text(encoding="utf-8") == "no markers"


def test_the_scripts_understand_the_commands_and_label_their_rows_as_expected():
    from evaluation import evaluate_perplexity, evaluate_speed

    options = readme_table.build_parser().parse_args(["--dataset", "text.txt", "--task_type", "QA"])
    speed = evaluate_speed.build_parser().parse_args(readme_table.speed_command(options, True)[1:])
    quality = evaluate_perplexity.build_parser().parse_args(readme_table.quality_command(options, True)[1:])
    assert speed.compare == quality.compare == "llama.cpp"
    assert (quality.dataset, quality.limit) == ("text.txt", 40)
    speed.method = quality.method  # without transformers, which has no point in the grid
    for arguments in (speed, quality):
        labels = {point.label for point in build_grid(arguments)}
        assert labels == {row["label"] for row in QUALITY[:-1]}


def test_the_caption_tells_the_conditions():
    speed = {"model": "M", "threads": 2, "kernels": "avx2", "repetitions": 7, "prompt_length": 128, "new_tokens": 64}
    text = caption({**speed, "rows": SPEED}, {"examples": 40})
    assert text.startswith("M in bfloat16, 2 threads, avx2 kernels.")
    assert "7 interleaved rounds" in text
    assert "40 windows of 256 + 128 tokens" in text
