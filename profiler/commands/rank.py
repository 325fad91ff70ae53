"""`rank`: another ranking from statistics that are already there."""

from __future__ import annotations

import argparse
from pathlib import Path

from profiler.arguments import add_overwrite
from profiler.ranking import SCORES, rank
from profiler.store import check_output, new_output
from transformers_patches import cli, flags
from transformers_patches.neurons.neuron_file import NeuronFile

HELP = "rank again by another score, from a neuron file's statistics, without the model"
EXAMPLES = """examples:
  python -m profiler rank qa.safetensors --score std_down --output qa_std_down.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="neuron file with statistics")
    parser.add_argument("--score", choices=SCORES, required=True, help="what the ranking goes by")
    parser.add_argument(
        "--output", type=Path, required=True, help="the new neuron file; with --overwrite it may be the same"
    )
    add_overwrite(parser)
    flags.add_json(parser)
    flags.add_config(parser)


def main(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    with new_output(arguments.output, overwrite=arguments.overwrite):
        file = NeuronFile.load(arguments.file)
        again = rank(file.statistics, arguments.score, file.metadata, file.source, file.input_squares, file.experts)
        again.save(arguments.output)
    content = {"output": str(arguments.output), **again.metadata}
    cli.report(arguments.json, content, f"{arguments.output}: ranked by {arguments.score}")
