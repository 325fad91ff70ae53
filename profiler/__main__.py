"""`python -m profiler COMMAND`: calls the module of that name in profiler/commands."""

from __future__ import annotations

import argparse
import importlib
import sys

from transformers_patches import cli, flags
from transformers_patches.weights.lookup import find_model

COMMANDS = ("run", "loss", "cluster", "fit", "round", "merge", "rank", "random", "convert", "show", "compare")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m profiler", description="Find out which FFN neurons of a model matter for a task."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"profiler.commands.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 done, 1 failed, 130 interrupted; argparse exits with 2 on wrong usage."""
    cli.prepare_torch()  # commands import torch
    arguments = flags.parse(build_parser(), argv)
    hint = "; run again with --resume to go on" if arguments.command in ("run", "fit") else ""
    return cli.guarded(lambda: _call(arguments), f"interrupted{hint}")


def _call(arguments: argparse.Namespace) -> None:
    """Call the command, with --model_name turned into the path that it stands for."""
    cli.begin(arguments)
    if getattr(arguments, "model_name", None) or getattr(arguments, "checkpoint_path", None):
        arguments.checkpoint_path = find_model(arguments.model_name, arguments.checkpoint_path)
    arguments.main(arguments)


def run() -> None:
    """The installed command."""
    sys.exit(main())


if __name__ == "__main__":
    run()
