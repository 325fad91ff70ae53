"""`compare`: how much rankings agree."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from profiler.analysis import chance_overlap, overlap_matrix
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.neuron_file import NeuronFile

HELP = "compare the top neurons of two or more neuron files, per layer, on average, and against chance"
EXAMPLES = """examples:
  python -m profiler compare qa.safetensors translate.safetensors summarize.safetensors --top 0.3
  python -m profiler compare qa.safetensors=QA random.safetensors=random --plot overlap.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE[=NAME]", help="neuron files, with a name for the table if wanted"
    )
    parser.add_argument("--top", type=float, default=0.3, help="fraction of a layer's neurons that is compared (0.3)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a heat map of the mean overlaps")
    flags.add_json(parser)
    flags.add_config(parser)


def main(arguments: argparse.Namespace) -> None:
    if len(arguments.files) < 2:
        raise PartInferError(f"compare needs at least two neuron files, got {len(arguments.files)}")
    if not 0 < arguments.top <= 1:
        raise PartInferError(f"--top must be a fraction in (0, 1], got {arguments.top}")
    named = [_path_and_name(given) for given in arguments.files]
    files, names = [NeuronFile.load(path) for path, _ in named], [name for _, name in named]
    matrix = overlap_matrix(files, arguments.top)  # [files, files, layers]
    chance = chance_overlap(files[0].intermediate_size, arguments.top)
    if arguments.plot:
        from profiler.plots import plot_overlap  # matplotlib takes a second to import

        plot_overlap(matrix.mean(2), names, arguments.top, chance, arguments.plot)
    if arguments.json:
        result = {"top": arguments.top, "chance": chance, "files": names, "overlap": matrix.tolist()}
        cli.write_json(arguments.json, result)
    if arguments.json != flags.STANDARD_OUTPUT:
        _print_text(matrix, names, arguments.top, chance)


def _path_and_name(given: str) -> tuple[str, str]:
    """The parts of FILE[=NAME]; a file may have = in its name."""
    path, equals, name = given.rpartition("=")
    if not equals or Path(given).is_file():
        path, name = given, ""
    return path, name or Path(path).stem


def _print_text(matrix: torch.Tensor, names: list[str], top: float, chance: float) -> None:
    print(f"overlap of the top {100 * top:g} % of the neurons, mean over layers, % (chance: {100 * chance:.1f})")
    width = max(8, *(len(name) + 1 for name in names))
    print(" " * width + "".join(f"{name:>{width}}" for name in names))
    for name, row in zip(names, matrix.mean(2), strict=True):
        print(f"{name:{width}}" + "".join(f"{100 * value:{width}.1f}" for value in row))
    pairs = [(row, column) for row in range(len(names)) for column in range(row + 1, len(names))]
    headings = [f"{names[row]} / {names[column]}" for row, column in pairs]
    print("\nper layer, %")
    print("layer" + "".join(f"  {heading}" for heading in headings))
    for layer in range(matrix.shape[2]):
        values = (
            f"  {100 * matrix[row, column, layer]:{len(h)}.1f}"
            for (row, column), h in zip(pairs, headings, strict=True)
        )
        print(f"{layer:5}" + "".join(values))
