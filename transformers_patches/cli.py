"""What every script does alike: exit codes, one-line errors, JSON/YAML settings under the flags."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from transformers_patches.errors import PartInferError

DONE, FAILED, INTERRUPTED = 0, 1, 130
IGNORE_FLAG = "--ignore_gguf_key"
IGNORED_GGUF_KEYS: set[str] = set()  # of this process: what is read without them does not depend on who reads it


def wait_briefly() -> None:
    """Let OpenMP's threads (GNU) sleep soon where they wait for each other; only before torch is imported.

    By default they spin for milliseconds, so that beside another busy program decoding falls to a hundredth of its speed
    (docs/speed.md). Does nothing where the environment says how to wait.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit: 0 done, 1 failed with one line on standard error, 130 interrupted."""
    try:
        code = main() or DONE
    except PartInferError as error:
        print(f"error: {error}", file=sys.stderr)
        code = FAILED
    except BrokenPipeError:
        sys.stderr.close()
        code = FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


class _IgnoreKey(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        IGNORED_GGUF_KEYS.add(values)


def add_gguf_arguments(parser: argparse._ActionsContainer) -> None:
    """The flag of every script that reads models for keys of GGUF files that are not understood."""
    parser.add_argument(
        IGNORE_FLAG,
        action=_IgnoreKey,
        metavar="KEY",
        default=argparse.SUPPRESS,
        help="read a GGUF file as if it did not have this metadata key; may be given several times",
    )


def parse_with_config(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags over a --config file (YAML or JSON, flag names as keys); flags that are given win.

    The file's values go through the parser as flags do, so types and choices are checked alike; mistakes end
    the program with exit code 2.
    """
    path = _config_path(argv)
    if path is None:
        return parser.parse_args(argv)
    return parser.parse_args([*_flags_of(parser, path), *(sys.argv[1:] if argv is None else argv)])


def _config_path(argv: list[str] | None) -> str | None:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    return first.parse_known_args(argv)[0].config


def _flags_of(parser: argparse.ArgumentParser, path: str) -> list[str]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"config file {path} can't be read: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        parser.error(f"config file {path}: expected names and values, got {type(content).__name__}")
    actions = {
        option.lstrip("-").replace("-", "_"): (option, a) for a in parser._actions for option in a.option_strings
    }
    flags = []
    for name, value in content.items():
        if str(name).replace("-", "_") not in actions:
            parser.error(f"config file {path}: unknown setting {name!r}; the settings are the flags of --help")
        option, action = actions[str(name).replace("-", "_")]
        if action.nargs == 0:  # a switch
            flags += [option] if value else []
        elif value is not None:
            flags += [part for item in (value if isinstance(value, list) else [value]) for part in (option, str(item))]
    return flags
