"""`merge`: one ranking from the statistics of several data sets."""

from __future__ import annotations

import argparse
from pathlib import Path

from profiler.arguments import add_overwrite
from profiler.merging import merge
from profiler.ranking import SCORES
from profiler.store import check_output, new_output
from transformers_patches import cli, flags
from transformers_patches.neurons.neuron_file import NeuronFile

HELP = "rank by the statistics of several neuron files, each data set with equal weight"
EXAMPLES = """examples:
  python -m profiler merge de_en.safetensors ro_en.safetensors --task_type translate --output translate.safetensors
  python -m profiler merge qa.safetensors translate.safetensors summarize.safetensors --output model.safetensors

A file that was merged from k data sets counts k times, so merging in steps gives what merging at once gives.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", help="neuron files with statistics, all of one model")
    parser.add_argument("--output", type=Path, required=True, help="the merged neuron file")
    parser.add_argument("--task_type", default="model", help="name of the group in the file's metadata (model)")
    parser.add_argument("--score", choices=SCORES, default="mean_abs", help="what the ranking goes by (mean_abs)")
    add_overwrite(parser)
    flags.add_json(parser)
    flags.add_config(parser)


def main(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    with new_output(arguments.output, overwrite=arguments.overwrite):
        merged = merge([NeuronFile.load(path) for path in arguments.files], arguments.score, arguments.task_type)
        merged.save(arguments.output)
    text = f"{arguments.output}: {merged.metadata['datasets']} data sets, {merged.tokens} tokens, {arguments.score}"
    cli.report(arguments.json, {"output": str(arguments.output), **merged.metadata}, text)
