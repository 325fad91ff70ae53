#!/usr/bin/env python3
"""Loss against tokens/s and against resident memory, of methods and settings beside llama.cpp's types of the same weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evaluation.compared.kinds import HELP, parse_compared
from evaluation.methods import (
    Configuration,
    add_dtypes_argument,
    add_method_arguments,
    build_typed_grid,
    check_speed_means_something,
)
from evaluation.tables import markdown_table
from evaluation.windows import PREFILL_TOKENS, SCORED_TOKENS, Source
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError
from transformers_patches.files import make_folder, scratch_folder, write_text_atomic

DEFAULT_METHODS = "dense,partinfer,original"
BATCH_SIZE = 4  # windows that are scored together


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_method_arguments(parser, DEFAULT_METHODS)
    add_dtypes_argument(parser)
    add = parser.add_argument
    add("--dataset", required=True, metavar="FILE-or-hub-id", help="as evaluate_perplexity.py takes it")
    add("--limit", type=int, default=40, metavar="WINDOWS", help="windows of it (40)")
    add("--compare", default="", metavar="LIST", help=HELP)
    add("--prompt_length", type=int, default=128, help="tokens that are prefilled where speed is measured (128)")
    add("--num_tokens_to_generate", type=int, default=64, help="tokens that are decoded there (64)")
    add("--repetitions", type=int, default=5, help="measured rounds (5)")
    add("--output", default="results", metavar="FOLDER", help="where frontier_<model>.json, .md and .png go (results)")
    add("--seed", type=int, default=0, help="of the sample of windows, prompts and rankings (0)")
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_config(parser)
    parser.set_defaults(warmup=1, bootstrap_iters=1000)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = flags.parse(parser, argv)
    try:
        grid, kinds = _grid(arguments), parse_compared(arguments.compare)
        flags.check_model(arguments)
        for name, least in (("limit", 1), ("prompt_length", 1), ("num_tokens_to_generate", 2), ("repetitions", 1)):
            if getattr(arguments, name) < least:
                raise PartInferError(f"{name} must be at least {least}, got {getattr(arguments, name)}")
    except PartInferError as error:
        parser.error(str(error))
    cli.hide_bars(arguments)  # threads wait as they do by default: that is measured
    rows, conditions, path = _measure(arguments, grid, kinds)
    text = f"{table(rows)}\n\n{caption(conditions)}\n"
    from evaluation.frontier_plot import plot_frontier

    plot_frontier(rows, conditions["model"], path.with_suffix(".png"))
    write_text_atomic(path.with_suffix(".md"), _page(text, conditions["model"], path.with_suffix(".png").name, rows))
    cli.report(arguments.json, {"conditions": conditions, "rows": rows}, text, indent=1)
    return cli.DONE


def _grid(arguments: argparse.Namespace) -> list[Configuration]:
    """The configurations, a dense one first. PartInferError for wrong usage."""
    grid = build_typed_grid(arguments)
    check_speed_means_something(grid)
    if grid[0].method != "dense":
        raise PartInferError(f"--method begins with dense, which the others are compared to, got {arguments.method!r}")
    return grid


def _measure(
    arguments: argparse.Namespace, grid: list[Configuration], kinds: list[str | None]
) -> tuple[list[dict], dict, Path]:
    """The rows, under which conditions they were measured, and the file that keeps them."""
    # heavy imports only now: --help and wrong usage answer at once
    import torch

    from evaluation.compared.files import ComparedFiles, own_kind
    from evaluation.frontier_rows import Point, RowFile, measure_points, speed_arguments
    from evaluation.models import model_label, settled
    from evaluation.perplexity import dense_logits
    from evaluation.perplexity_rows import PerplexityRows
    from evaluation.speed.measure import Measurement
    from evaluation.windows import read_examples
    from transformers_patches import kernels
    from transformers_patches.weights.lookup import find_model
    from transformers_patches.weights.model_files import load_tokenizer, open_weights, read_config

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = find_model(arguments.model_name, arguments.checkpoint_path)
    config, model = read_config(folder), model_label(folder)
    source = Source(arguments.dataset, limit=arguments.limit, seed=arguments.seed)
    examples = read_examples(source, load_tokenizer(folder), config.max_position_embeddings)
    grid = [settled(configuration, folder, arguments.task_type) for configuration in grid]
    names = [kind or own_kind(config, arguments.dtype) for kind in kinds]
    points = [Point(configuration.label, configuration) for configuration in grid]
    points += [Point(f"llama.cpp {name}", kind=name) for name in dict.fromkeys(names)]
    conditions = {
        "model": model,
        "dataset": Path(arguments.dataset).name,
        "examples": len(examples),
        "threads": arguments.threads or torch.get_num_threads(),
        "kernels": kernels.variant(),
        **{
            name: getattr(arguments, name)
            for name in ("prompt_length", "num_tokens_to_generate", "repetitions", "seed")
        },
    }
    make_folder(Path(arguments.output))
    path = Path(arguments.output) / f"frontier_{model}.json"
    kept = RowFile(path, conditions)
    with dense_logits() as store, scratch_folder("compared") as scratch:
        files = None
        if kinds:
            files = ComparedFiles(folder, lambda: open_weights(folder), config, own_kind(config), scratch)
        losses = PerplexityRows(folder, examples, BATCH_SIZE, arguments, store)
        timed = speed_arguments(arguments)
        rows = measure_points(points, kept, losses, lambda: Measurement(timed, scratch, files), files)
    return rows, conditions, path


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    shown = [
        {
            "": row["label"],
            "loss, nats": row["excess_nll"],
            "loss, nats_ci": row["excess_nll_ci"],
            "tokens/s": f"{row['decode_tokens_per_second']:.1f}",
            "× dense": f"{row['speedup_over_dense']:.2f}",
            "of block bytes": f"{row['block_bytes_fraction']:.0%}",
            "MB/token": f"{row['token_bytes'] / 1e6:.0f}",
            "MB of weights": f"{row['weight_bytes_resident'] / 1e6:.0f}",
            "peak MB": f"{row['peak_memory_bytes'] / 1e6:.0f}",
        }
        for row in rows
    ]
    return markdown_table(shown, [name for name in shown[0] if not name.endswith("_ci")])


def caption(conditions: dict) -> str:
    """The conditions of the measurement, in one paragraph."""
    return (
        f"{conditions['model']}, {conditions['threads']} threads, {conditions['kernels']} kernels. Loss over the first "
        f"dense row: {conditions['examples']} windows of {PREFILL_TOKENS} + {SCORED_TOKENS} tokens of "
        f"{conditions['dataset']}. Speed: {conditions['prompt_length']} prompt tokens, "
        f"{conditions['num_tokens_to_generate']} generated, medians of {conditions['repetitions']} rounds that each row "
        "took in turn with the first dense row; tokens/s are that row's median over all runs times the ratio."
    )


def _page(text: str, model: str, figure: str, rows: list[dict]) -> str:
    notes = [f"* {row['label']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join([f"# {model}", "", f"![loss against tokens/s and memory]({figure})", "", text, *notes]) + "\n"


if __name__ == "__main__":
    cli.run(main)
