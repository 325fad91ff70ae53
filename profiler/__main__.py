"""`python -m profiler COMMAND`: calls the module of that name in profiler/commands."""

from __future__ import annotations

import argparse
import importlib
import sys

from transformers_patches import cli
from transformers_patches.errors import PartInferError

COMMANDS = ("run", "fit", "merge", "rank", "random", "convert", "show", "compare")


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
    cli.wait_briefly()  # commands import torch
    arguments = build_parser().parse_args(argv)
    try:
        arguments.main(arguments)
    except PartInferError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # show | head
        sys.stderr.close()
        return 1
    except OSError as error:  # no permission, a full disk, …
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; run again with --resume to go on" if arguments.command == "run" else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
