"""The flags that all scripts share: which model, where it runs, what is printed, and a file of settings.

`--json` prints one JSON object on standard output instead of text. `--json FILE` prints the text and writes the object
to a file. Commands with positional arguments take `--json=FILE` only, so that `--json a.safetensors` means what it
looks like.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

import yaml

from transformers_patches.catalog import DEMO_MODEL
from transformers_patches.errors import PartInferError

STANDARD_OUTPUT = "-"
IGNORE_FLAG = "--ignore_gguf_key"
IGNORED_GGUF_KEYS: set[str] = set()  # for the whole process, since any part of it may read the file
FREE_TEXTS = ("prompt", "system_prompt", "stop")  # flags whose values go to the tokenizer
OUTPUTS = ("json", "csv", "plot", "mask_filepath", "output", "output_path")  # flags that name what is written
RANGES = {"threads": (1, 1024), "seed": (0, 2**32 - 1)}  # OpenMP crashes with very many; NumPy's seeds have 32 bits
WIDEST = 100  # columns of help texts
SHELLS = ("bash", "zsh", "tcsh")
NOT_SETTINGS = (
    "config",
    "debug",
    "help",
    "version",
    "h",
    "print_completion",
)  # flags that a file of settings can't give


class Help(argparse.RawDescriptionHelpFormatter):
    """Help texts at most WIDEST columns wide; examples in the epilog keep their lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(WIDEST, shutil.get_terminal_size().columns) - 2)


def add_completion(parser: argparse.ArgumentParser) -> None:
    """--print_completion SHELL, which prints a program for the shell and ends, if the library shtab is there."""
    text = "print what makes the Tab key complete flags in this shell (needs shtab: pip install -r requirements-terminal.txt)"
    parser.add_argument("--print_completion", action=_Completion, choices=SHELLS, help=text)


class _Completion(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            import shtab  # optional, and needed once
        except ImportError:
            parser.error(f"{option_string} needs the library shtab: pip install -r requirements-terminal.txt")
        print(shtab.complete(parser, shell=values))
        parser.exit()


def add_model(parser: argparse.ArgumentParser, default: str | None = DEMO_MODEL) -> argparse._ArgumentGroup:
    """--model_name, --checkpoint_path and --ignore_gguf_key; the group, for more flags about the model."""
    group = parser.add_argument_group("model")
    shown = f" ({default})" if default else ""
    group.add_argument("--model_name", default=default, help=f"short name, hub id, or a name in models/{shown}")
    group.add_argument("--checkpoint_path", metavar="PATH", help="where it is: a folder or GGUF file (models/<name>)")
    group.add_argument(
        IGNORE_FLAG,
        action=_IgnoreKey,
        metavar="KEY",
        default=argparse.SUPPRESS,
        help="read a GGUF file as if it did not have this metadata key; may be given several times",
    )
    return group


class _IgnoreKey(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        IGNORED_GGUF_KEYS.add(values)


def add_computing(group: argparse._ArgumentGroup) -> None:
    """--cpu_only and --threads, beside --device and --dtype."""
    group.add_argument("--cpu_only", action="store_true", help="the same as --device cpu")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (PyTorch's choice)")


def add_json(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """--json [FILE]; the value is None, STANDARD_OUTPUT, or the file's path."""
    text = "one JSON object on standard output instead of text; with FILE, the text and an object in that file"
    group.add_argument("--json", nargs="?", const=STANDARD_OUTPUT, metavar="FILE", help=text)


def add_quiet(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """--quiet."""
    group.add_argument("--quiet", action="store_true", help="the result only: no progress, no notes")


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config FILE, which `parse` reads."""
    text = "settings from a YAML or JSON file, flag names as keys; flags win"
    parser.add_argument("--config", metavar="FILE", help=text)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """--debug, of the parser or of each of its commands."""
    commands = next(
        (a.choices.values() for a in parser._actions if isinstance(a, argparse._SubParsersAction)), [parser]
    )
    for command in commands:
        command.add_argument("--debug", action="store_true", help="show where in the code an error comes from")


def check_model(arguments: argparse.Namespace) -> None:
    """PartInferError unless a model was given, for scripts that have none by default."""
    if arguments.model_name is None and arguments.checkpoint_path is None:
        raise PartInferError("which model? Give --model_name or --checkpoint_path")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags over a --config file; flags that are given win. Mistakes end the program with exit code 2.

    The file's values go through the parser as flags do, so types and choices are checked alike. --cpu_only has become
    --device cpu afterwards. Every script has --debug, which is for cli.guarded.
    """
    add_debug(parser)
    argv = list(sys.argv[1:] if argv is None else argv)
    command = _command_of(parser, argv)
    if any(not action.option_strings for action in command._actions):
        argv = [re.sub(r"^--j(s(on?)?)?$", f"--json={STANDARD_OUTPUT}", part) for part in argv]
    path = _config_path(argv)
    if path is not None:
        place = 0 if command is parser else 1  # after the command's name
        argv[place:place] = _flags_of(command, path)
    arguments = parser.parse_args(argv)
    _settle(command, arguments)
    return arguments


def _command_of(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.ArgumentParser:
    """The parser of the command that argv names, if there are commands, else the parser itself."""
    commands = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    return parser if commands is None or not argv else commands.choices.get(argv[0], parser)


def _settle(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    if given.get("cpu_only"):
        if given["device"] not in (None, "auto", "cpu"):
            parser.error(f"--cpu_only contradicts --device {given['device']}: leave one of them out")
        arguments.device = "cpu"
    for name in FREE_TEXTS:
        for text in given[name] if isinstance(given.get(name), list) else [given.get(name) or ""]:
            if not _is_unicode(text):
                parser.error(f"--{name} is not in the terminal's encoding: {text!r:.60}; give it as UTF-8")
    for name, (low, high) in RANGES.items():
        number = given.get(name)
        if number is not None and not low <= number <= high:
            expected = f"from {low} to {high}" if number > high else f"at least {low}"
            parser.error(f"{name} must be {expected}, got {number}")
    for name in OUTPUTS:
        if given.get(name) == "":
            parser.error(f"--{name} is empty: give the path of a file, or leave it out")


def _is_unicode(text: str) -> bool:
    """Whether every byte of an argument is valid in its encoding; Python keeps invalid ones as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _config_path(argv: list[str]) -> str | None:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    return first.parse_known_args(argv)[0].config


def _flags_of(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """A settings file as flags; exits with 2 for a file or a value that can't be one."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"config file {path} can't be read: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        parser.error(f"config file {path}: expected names and values, got {type(content).__name__}")
    actions = {
        option.lstrip("-").replace("-", "_"): (option, a) for a in parser._actions for option in a.option_strings
    }
    flags = []
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key not in actions or key in NOT_SETTINGS:
            parser.error(f"config file {path}: unknown setting {name!r}; the settings are the flags of --help")
        try:
            flags += _flag(*actions[key], value)
        except ValueError as error:
            parser.error(f"config file {path}: {name}: {error}")
    return flags


def _flag(option: str, action: argparse.Action, value: object) -> list[str]:
    """One setting as flags, none if it is null; ValueError for a value that the flag can't have."""
    if value is None:
        return []
    if action.nargs == 0 or (action.nargs == "?" and isinstance(value, bool)):  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r:.60}")
        return ([f"{option}={action.const}"] if action.nargs else [option]) if value else []
    several = isinstance(action, argparse._AppendAction | _IgnoreKey)
    if isinstance(value, list) and not several:
        raise ValueError(f"expected one value, got a list of {len(value)}")
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise ValueError(f"expected a text or a number, got {item!r:.60} (put a text in quotes)")
    return [f"{option}={item}" for item in items]
