"""`random`: the baseline, a seeded permutation of every layer's neurons."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from profiler.arguments import DEMO_MODEL
from profiler.commands.run import NEURON_FILES
from profiler.placement import checkpoint_fingerprint
from transformers_patches.cli import add_gguf_arguments
from transformers_patches.families import family_of
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.weights.model_files import model_name

HELP = "write a random ranking, the baseline"
EXAMPLES = """examples:
  python -m profiler random --seed 0
  python -m profiler random --checkpoint_path models/Qwen2.5-Coder-1.5B-Instruct --output random.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint_path", type=Path, default=DEMO_MODEL, help=f"the model's folder ({DEMO_MODEL})")
    add_gguf_arguments(parser)
    parser.add_argument("--output", type=Path, help="neuron file (neuron_files/<model>/random.safetensors)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other permutations (0)")


def main(arguments: argparse.Namespace) -> None:
    config, fingerprint = checkpoint_fingerprint(arguments.checkpoint_path)
    name = model_name(arguments.checkpoint_path)
    ranking = random_ranking(config.num_hidden_layers, family_of(config).intermediate_size(config), arguments.seed)
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
    output = arguments.output or NEURON_FILES / name / "random.safetensors"
    NeuronFile(ranking, metadata=metadata).save(output)
    print(f"{output}: {ranking.shape[0]} layers of {ranking.shape[1]} neurons in random order, seed {arguments.seed}")


def random_ranking(num_layers: int, intermediate_size: int, seed: int) -> torch.Tensor:
    """int32 [layers, N], each row a permutation; the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(intermediate_size, generator=generator) for _ in range(num_layers)]).int()
