"""`random`: the baseline, a seeded permutation of every layer's neurons."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from profiler.arguments import add_overwrite
from profiler.placement import checkpoint_fingerprint
from profiler.store import new_output
from transformers_patches import cli, flags
from transformers_patches.families import family_of
from transformers_patches.neurons.lookup import own_neuron_file
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.neurons.random_ranking import random_ranking
from transformers_patches.weights.lookup import model_name

HELP = "write a random ranking, the baseline"
EXAMPLES = """examples:
  python -m profiler random --seed 0
  python -m profiler random --checkpoint_path models/Qwen2.5-Coder-1.5B-Instruct --output random.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model(parser)
    parser.add_argument("--output", type=Path, help="neuron file (neuron_files/<model>/random.safetensors)")
    add_overwrite(parser)
    flags.add_json(parser)
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other permutations (0)")
    flags.add_config(parser)


def main(arguments: argparse.Namespace) -> None:
    name = model_name(arguments.checkpoint_path)
    output = arguments.output or own_neuron_file(name, "random")
    with new_output(output, overwrite=arguments.overwrite):
        neurons = _random_file(arguments, name)
        neurons.save(output)
    shape = f"{neurons.num_layers} layers of {neurons.intermediate_size} neurons"
    content = {"output": str(output), **neurons.metadata}
    cli.report(arguments.json, content, f"{output}: {shape} in random order, seed {arguments.seed}")


def _random_file(arguments: argparse.Namespace, name: str) -> NeuronFile:
    config, fingerprint = checkpoint_fingerprint(arguments.checkpoint_path)
    neurons = random_ranking(config.num_hidden_layers, family_of(config).intermediate_size(config), arguments.seed)
    metadata = {
        "model_name": name,
        "model_type": config.model_type,
        "fingerprint": fingerprint,
        "dataset": "none",
        "task_type": "random",
        "score": "random",
        "seed": str(arguments.seed),
        "tokens": "0",
        "texts": "0",
    }
    return replace(neurons, metadata=metadata)
