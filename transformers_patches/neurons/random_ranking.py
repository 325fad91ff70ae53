"""The baseline: neurons in random order."""

from __future__ import annotations

import torch

from transformers_patches.neurons.neuron_file import NeuronFile


def random_ranking(num_layers: int, intermediate_size: int, seed: int) -> NeuronFile:
    """A permutation of the neurons for each layer; the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(intermediate_size, generator=generator) for _ in range(num_layers)]
    return NeuronFile(torch.stack(rows).int(), source=f"(random ranking, seed {seed})")
