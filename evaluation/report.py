#!/usr/bin/env python3
"""Turn a results folder into tables (Markdown, CSV, JSON) and figures: scores relative to dense, and trade-offs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evaluation.report_rows import (
    PERPLEXITY_COLUMNS,
    TASK_COLUMNS,
    by_configuration,
    mean_relative,
    perplexity_rows,
    task_rows,
)
from evaluation.tables import csv_text, markdown_table
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError
from transformers_patches.files import write_text_atomic

_MEAN_COLUMNS = (
    *("configuration", "relative", "tasks", "ffn_bytes_fraction", "loaded_bytes_fraction", "token_bytes_fraction"),
)
_PERPLEXITY_TABLE = (
    *("configuration", "nll", "excess_nll", "perplexity", "kl_to_dense", "top1_agreement"),
    *("ffn_bytes_fraction", "loaded_bytes_fraction", "token_bytes_fraction"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", default="results", help="results folder (results)")
    parser.add_argument("--output_path", metavar="FOLDER", help="where the report goes (the results folder)")
    parser.add_argument(
        "--metric",
        default="",
        metavar="NAMES",
        help="metrics, separated by commas, that stand for a task where it has them, such as chrf (accuracy, exact "
        "match, F1, BLEU, ROUGE, perplexity)",
    )
    parser.add_argument("--no_figures", action="store_true", help="tables only")
    flags.add_json(parser)
    flags.add_config(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = flags.parse(build_parser(), argv)
    folder = Path(arguments.results)
    if not folder.is_dir():
        raise PartInferError(f"no results folder at {folder}: run evaluate_task.py or evaluate_perplexity.py first")
    rows = {"tasks": task_rows(folder, arguments.metric.split(",")), "perplexity": perplexity_rows(folder)}
    if not any(rows.values()):
        raise PartInferError(f"{folder} holds no results: run evaluate_task.py or evaluate_perplexity.py first")
    out = Path(arguments.output_path or folder)
    figures = [] if arguments.no_figures else _write_figures(rows, out)
    text = _markdown(rows, figures)
    write_text_atomic(out / "report.md", text)
    write_text_atomic(out / "report_tasks.csv", csv_text(rows["tasks"], TASK_COLUMNS))
    write_text_atomic(out / "report_perplexity.csv", csv_text(rows["perplexity"], PERPLEXITY_COLUMNS))
    content = {"format": "partinfer-report", **rows}
    cli.write_json(out / "report.json", content, indent=1)
    cli.report(arguments.json, content, text, indent=1)
    return cli.DONE


def _models(rows: dict[str, list[dict]]) -> list[str]:
    return list(dict.fromkeys(row["model"] for kind in rows.values() for row in kind))


def _of(rows: list[dict], model: str) -> list[dict]:
    return [row for row in rows if row["model"] == model]


def _write_figures(rows: dict[str, list[dict]], out: Path) -> list[tuple[str, str]]:
    """Draw the figures that the rows allow. Returns (model, file name) of each."""
    from evaluation.report_figures import relative_scores, trade_off

    written = []
    for model in _models(rows):
        tasks, perplexity = _of(rows["tasks"], model), _of(rows["perplexity"], model)
        means = mean_relative(tasks)
        if any(row["configuration"] != "dense" for row in means):
            relative_scores(tasks, model, out / f"{model}_relative.png")
            trade_off(means, "relative", "mean score relative to dense", model, out / f"{model}_trade_off.png")
            written += [(model, f"{model}_relative.png"), (model, f"{model}_trade_off.png")]
        for dataset in dict.fromkeys(row["dataset"] for row in perplexity):
            mine = [row for row in perplexity if row["dataset"] == dataset and row["excess_nll"] is not None]
            if mine:
                name = f"{model}_{dataset}_excess_nll.png"
                trade_off(mine, "excess_nll", f"excess NLL ({dataset})", model, out / name)
                written.append((model, name))
    return written


def _markdown(rows: dict[str, list[dict]], figures: list[tuple[str, str]]) -> str:
    """A section for each model: means, tasks, perplexity, figures."""
    parts = []
    for model in _models(rows):
        tasks, perplexity = _of(rows["tasks"], model), _of(rows["perplexity"], model)
        parts.append(f"## {model}")
        if tasks:
            parts += ["Mean score relative to dense:", markdown_table(mean_relative(tasks), _MEAN_COLUMNS)]
            columns = ["task", "metric", "samples", *dict.fromkeys(row["configuration"] for row in tasks)]
            parts += ["Scores, with standard errors:", markdown_table(by_configuration(tasks), columns)]
        for dataset in dict.fromkeys(row["dataset"] for row in perplexity):
            mine = [row for row in perplexity if row["dataset"] == dataset]
            parts += [f"{dataset}, {mine[0]['samples']} examples:", markdown_table(mine, _PERPLEXITY_TABLE)]
        parts += [f"![{model}]({name})" for owner, name in figures if owner == model]
    return "\n\n".join(parts) + "\n"


def run() -> None:
    """The installed command."""
    cli.run(main)


if __name__ == "__main__":
    run()
