"""`show`: what is in a neuron file."""

from __future__ import annotations

import argparse
from pathlib import Path

from profiler.analysis import concentration, concentration_curves
from transformers_patches import cli, flags
from transformers_patches.neurons.neuron_file import NeuronFile

HELP = "show what a neuron file holds, and how concentrated the activations are"
EXAMPLES = """examples:
  python -m profiler show neuron_files/SmolLM2-135M-Instruct/qa.safetensors
  python -m profiler show neuron_files/SmolLM2-135M-Instruct/qa.safetensors --plot concentration.png
"""
FRACTIONS = (0.1, 0.3, 0.5, 0.7)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="neuron file, .safetensors or .json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw concentration curves, one per layer")
    flags.add_json(parser)
    flags.add_config(parser)


def main(arguments: argparse.Namespace) -> None:
    file = NeuronFile.load(arguments.file)
    shares = concentration(file, FRACTIONS) if "mean_abs" in file.statistics else None
    if arguments.plot:
        from profiler.plots import plot_concentration  # matplotlib takes a second to import

        data = file.metadata
        title = (
            f"{data.get('model_name', arguments.file.name)}, {data.get('task_type', '?')}: activation mass by neurons"
        )
        plot_concentration(concentration_curves(file), title, arguments.plot)
    if arguments.json:
        table = None if shares is None else {f"{f:g}": shares[:, i].tolist() for i, f in enumerate(FRACTIONS)}
        content = {
            "file": str(arguments.file),
            "layers": file.num_layers,
            "intermediate_size": file.intermediate_size,
            "metadata": file.metadata,
            "statistics": sorted(file.statistics),
            "concentration": table,
        }
        cli.write_json(arguments.json, content)
    if arguments.json != flags.STANDARD_OUTPUT:
        _print_text(file, shares)


def _print_text(file: NeuronFile, shares) -> None:
    print(file.source)
    print(f"  {'layers':18} {file.num_layers}")
    print(f"  {'neurons per layer':18} {file.intermediate_size}")
    for name, value in sorted(file.metadata.items()):
        print(f"  {name:18} {value!r}" if "\n" in value else f"  {name:18} {value}")
    if shares is None:
        print("  no statistics (a legacy or random ranking), so no concentration")
        return
    print(f"  {'statistics':18} {', '.join(sorted(file.statistics))}")
    print("\nshare of the activation mass (mean |h|) in the best neurons, %")
    print("layer " + "".join(f"{f'top {100 * f:g} %':>11}" for f in FRACTIONS))
    for layer, row in enumerate(shares):
        print(f"{layer:5} " + "".join(f"{100 * value:11.1f}" for value in row))
    print(f"{'mean':>5} " + "".join(f"{100 * value:11.1f}" for value in shares.mean(0)))
