#!/usr/bin/env python3
"""Measure decoding: methods and settings in turn, beside plain transformers, llama.cpp and the memory's bandwidth."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evaluation.compared import kinds
from evaluation.methods import (
    Configuration,
    add_dtypes_argument,
    add_method_arguments,
    build_typed_grid,
    check_speed_means_something,
)
from evaluation.tables import csv_text
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError
from transformers_patches.files import scratch_folder, write_text_atomic

DEFAULT_METHODS = "dense,partinfer"
TRANSFORMERS = "transformers"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_method_arguments(parser, DEFAULT_METHODS, also=(TRANSFORMERS,))
    add = parser.add_argument
    add("--random_weights", metavar="NAME", help="random weights instead of a model: a known shape, or a config.json")
    add_dtypes_argument(parser)
    add("--compare", default="", metavar="LIST", help=kinds.HELP)
    add("--prompt", help="text that is prefilled (random tokens)")
    add("--prompt_length", type=int, default=128, help="tokens that are prefilled without --prompt (128)")
    add("--num_tokens_to_generate", type=int, default=64, help="tokens that are decoded, the first one included (64)")
    add("--batch_size", type=int, default=1, help="prompts at a time (1)")
    add("--repetitions", type=int, default=5, help="measured rounds (5)")
    add("--warmup", type=int, default=1, help="rounds before them (1)")
    add("--seed", type=int, default=0, help="of random weights, prompts and rankings (0)")
    add("--csv", metavar="FILE", help="write the rows as CSV")
    add("--plot", metavar="FILE", help="write a figure of the speeds, such as speed.png")
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_config(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = flags.parse(parser, argv)
    try:
        with_transformers, grid = _methods(arguments)
        compared = _compared(arguments)
    except PartInferError as error:
        parser.error(str(error))
    cli.hide_bars(arguments)  # threads wait as they do by default: that is measured
    # heavy imports only now: --help and wrong usage answer at once
    from evaluation.speed.measure import Measurement

    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder("speed"))
        measurement = Measurement(arguments, scratch)
        rows = measurement.rows(grid, with_transformers, compared)
    content = {**measurement.conditions, "rows": rows}
    cli.report(arguments.json, content, _report(rows, measurement.conditions), indent=1)
    _write(rows, measurement.conditions, arguments)
    return cli.DONE


def _methods(arguments: argparse.Namespace) -> tuple[bool, list[Configuration]]:
    """Whether plain transformers is measured, and this project's configurations. PartInferError for wrong usage."""
    if not arguments.random_weights:
        flags.check_model(arguments)
    elif arguments.model_name or arguments.checkpoint_path:
        raise PartInferError("give a model or --random_weights, not both")
    least = {"num_tokens_to_generate": 2, "prompt_length": 1, "batch_size": 1, "repetitions": 1, "warmup": 0}
    for name, value in least.items():
        if getattr(arguments, name) < value:
            raise PartInferError(f"{name} must be at least {value}, got {getattr(arguments, name)}")
    if arguments.prompt is not None and arguments.random_weights:
        raise PartInferError("--prompt needs a model with a tokenizer: leave it out with --random_weights")
    names = [name.strip() for name in arguments.method.split(",")]
    ours = [name for name in names if name != TRANSFORMERS]
    arguments.method = ",".join(ours)
    grid = build_typed_grid(arguments) if ours else []
    check_speed_means_something(grid)
    return TRANSFORMERS in names, grid


def _compared(arguments: argparse.Namespace) -> list[str | None]:
    """The types of llama.cpp's weights: None for the model's own."""
    compared = kinds.parse_compared(arguments.compare)
    if compared and arguments.batch_size != 1:
        raise PartInferError(f"llama.cpp is compared at --batch_size 1, got {arguments.batch_size}")
    return compared


def _report(rows: list[dict], conditions: dict) -> str:
    from evaluation.speed.rows import table

    lines = [table(rows), ""]
    lines += [f"{row['label']}: {row['settings']}" for row in rows if row.get("settings")]
    lines.append(
        f"{conditions['model']}, {conditions['threads']} threads, batch {conditions['batch_size']}, "
        f"{conditions['prompt_length']} prompt tokens, {conditions['new_tokens']} generated, medians of "
        f"{conditions['repetitions']} interleaved rounds; kernels: {conditions['kernels']}; "
        f"bandwidth probe {conditions['probe_gigabytes_per_second']:.1f} GB/s"
    )
    if conditions["random_weights"]:
        lines.append("random weights: load s is the time to draw them, and says nothing about a disk")
    return "\n".join(lines)


def _write(rows: list[dict], conditions: dict, arguments: argparse.Namespace) -> None:
    from evaluation.speed.rows import COLUMNS

    if arguments.csv:
        write_text_atomic(arguments.csv, csv_text(rows, COLUMNS))
    if arguments.plot:
        from evaluation.speed.plot import plot_speeds

        plot_speeds(rows, conditions["model"], Path(arguments.plot))


def run() -> None:
    """The installed command."""
    cli.run(main)


if __name__ == "__main__":
    run()
