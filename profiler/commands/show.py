"""`show`: what is in a neuron file."""

from __future__ import annotations

import argparse
from pathlib import Path

from profiler.analysis import concentration, concentration_curves
from profiler.experts import few_tokens
from transformers_patches import cli, flags
from transformers_patches.neurons.expert_neurons import ExpertNeurons
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
    shares = concentration(file, FRACTIONS) if "mean_abs" in file.statistics and file.intermediate_size else None
    if arguments.plot:
        file.check_ffns()
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
            "experts": None if file.experts is None else _of_experts(file.experts),
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
    if file.experts is not None:
        _print_experts(file.experts)
    if not file.intermediate_size:
        return
    if shares is None:
        print("  no statistics (a legacy or random ranking), so no concentration")
        return
    print(f"  {'statistics':18} {', '.join(sorted(file.statistics))}")
    print("\nshare of the activation mass (mean |h|) in the best neurons, %")
    print("layer " + "".join(f"{f'top {100 * f:g} %':>11}" for f in FRACTIONS))
    for layer, row in enumerate(shares):
        print(f"{layer:5} " + "".join(f"{100 * value:11.1f}" for value in row))
    print(f"{'mean':>5} " + "".join(f"{100 * value:11.1f}" for value in shares.mean(0)))


def _of_experts(experts: ExpertNeurons) -> dict:
    """Numbers of each layer's experts."""
    _, count, size = experts.shape
    tokens = experts.tokens.sort(dim=1, descending=True).values
    half = (tokens.cumsum(1) * 2 < tokens.sum(1, keepdim=True)).sum(1) + 1
    return {
        "experts": count,
        "neurons": size,
        "few_tokens": experts.unknown,
        "layers": [
            {"layer": layer, "most_tokens": int(own[0]), "fewest_tokens": int(own[-1]), "half": int(some)}
            for layer, own, some in zip(experts.layers, tokens, half, strict=True)
        ],
    }


def _print_experts(experts: ExpertNeurons) -> None:
    found = _of_experts(experts)
    print(f"  {'experts':18} {found['experts']} of {found['neurons']} neurons in {len(experts.layers)} layers")
    print(f"  {few_tokens(experts)}")
    print("\ntokens that the router sent to an expert, and how many experts have half of them")
    print(f"layer{'most':>12}{'fewest':>12}{'half':>8}")
    for row in found["layers"]:
        print(f"{row['layer']:5}{row['most_tokens']:12}{row['fewest_tokens']:12}{row['half']:8}")
