#!/usr/bin/env python3
"""Run lm-eval tasks with one or more methods, log-likelihoods through the path that decodes."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evaluation.methods import add_method_arguments, build_grid
from evaluation.tables import markdown_table
from evaluation.windows import PREFILL_TOKENS, SCORED_TOKENS
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_method_arguments(parser, "partinfer")
    add = parser.add_argument
    flags.add_config(parser)
    add("--seed", type=int, default=0, help="of few-shot examples, sampling, random rankings without a file (0)")
    task = parser.add_argument_group("tasks")
    task.add_argument("--task_name", required=True, help="lm-eval tasks, groups or patterns, separated by commas")
    task.add_argument("--num_fewshot", type=int, help="worked examples before each question (as the task says)")
    task.add_argument("--limit", type=_limit, help="rows of each task, or a fraction of them if below 1 (all)")
    task.add_argument("--shuffle", action="store_true", help="draw those rows with --seed instead of the first ones")
    task.add_argument("--include_path", metavar="FOLDER", help="task YAMLs beside lm-eval's and evaluation/tasks")
    task.add_argument(
        "--data_dir", metavar="FOLDER", help="where local tasks find their files ($PARTINFER_DATA_DIR, else here)"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--batch_size", default="1", help="a number, or auto (1)")
    run.add_argument("--max_batch_size", type=int, default=64, help="where auto begins to try (64)")
    run.add_argument("--max_length", type=int, help="tokens of a request at most; longer ones lose their beginning")
    run.add_argument(
        "--prefill_tokens",
        type=int,
        default=PREFILL_TOKENS,
        help=f"context of a block in rolling log-likelihoods, the same for every method ({PREFILL_TOKENS})",
    )
    run.add_argument(
        "--scored_tokens", type=int, default=SCORED_TOKENS, help=f"block scored after it ({SCORED_TOKENS})"
    )
    run.add_argument("--gen_kwargs", help="generation options over the task's, such as temperature=0.7,do_sample=True")
    run.add_argument(
        "--apply_chat_template", action="store_true", help="wrap prompts as the model's chat template says"
    )
    run.add_argument("--system_instruction", help="what the model is told first")
    run.add_argument(
        "--run_generated_code",
        action="store_true",
        help="allow tasks that run what the model writes (local_humaneval), each program with limits, without network",
    )
    run.add_argument("--bootstrap_iters", type=int, default=1000, help="resamples of the standard errors (1000)")
    out = parser.add_argument_group("output")
    out.add_argument("--output_path", default="results", help="results folder (results)")
    flags.add_json(out)
    flags.add_quiet(out)
    out.add_argument("--log_samples", action="store_true", help="write every answer too, as <task>.samples.jsonl")
    out.add_argument(
        "--skip_finished", action="store_true", help="keep results, and answers, that the same run left there before"
    )
    return parser


def _limit(text: str) -> float | int:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value if value < 1 else int(value)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = flags.parse(parser, argv)
    try:
        grid = build_grid(arguments)
        flags.check_model(arguments)
        _check(arguments)
    except PartInferError as error:
        parser.error(str(error))
    cli.begin(arguments)
    # heavy imports only now: --help and wrong usage answer at once
    from evaluation.models import settled
    from evaluation.processes import Processes
    from evaluation.task_runs import TaskRunner
    from transformers_patches.weights.lookup import find_model

    processes = Processes()
    arguments.quiet = arguments.quiet or not processes.first
    runner = TaskRunner(find_model(arguments.model_name, arguments.checkpoint_path), arguments, processes)
    rows = []
    for configuration in grid:
        for task_type, tasks in runner.tasks_by_type().items():
            rows += runner.run(settled(configuration, runner.folder, task_type), task_type, tasks)
            gc.collect()  # one model at a time in memory
    if not processes.first:
        return cli.DONE
    table = markdown_table(rows, ["task", "configuration", "metric", "value", "stderr", "ffn_bytes_fraction"])
    cli.report(arguments.json, {"model": runner.model, "rows": rows}, table, indent=1)
    return cli.DONE


def _check(arguments: argparse.Namespace) -> None:
    if arguments.batch_size.partition(":")[0] != "auto" and not (
        arguments.batch_size.isdigit() and int(arguments.batch_size)
    ):
        raise PartInferError(f"batch_size must be a number above 0 or auto, got {arguments.batch_size!r}")
    for name in ("prefill_tokens", "scored_tokens", "max_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise PartInferError(f"{name} must be at least 1, got {value}")


def run() -> None:
    """The installed command."""
    cli.run(main)


if __name__ == "__main__":
    run()
