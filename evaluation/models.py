"""From a configuration to a loaded model: where the checkpoint is, and which neuron files belong to it."""

from __future__ import annotations

from pathlib import Path

import torch

from evaluation.methods import METHODS, Configuration
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import ffn_spec
from transformers_patches.loading import LoadedModel, load_model, read_config
from transformers_patches.neuron_file import NeuronFile
from transformers_patches.neuron_lookup import NEURON_FILES, find_neuron_files

MODELS = Path(__file__).resolve().parent.parent / "models"


def find_model(name: str) -> Path:
    """The checkpoint folder of a model given by path or by its name in models/; PartInferError if there is none."""
    for folder in (Path(name), MODELS / name):
        if (folder / "config.json").is_file():
            return folder.resolve()
    raise PartInferError(f"no model at {name} nor in {MODELS}: fetch one with python download.py")


def find_rankings(
    settings: PartInferConfig, folder: Path, task_type: str | None, *, random: bool = False, seed: int = 0
) -> dict[str, NeuronFile]:
    """The neuron files of a run, as load_model takes them: those the settings name, or else, for partial loading,
    those of the model and task in neuron_files/.

    random: the random ranking instead, from neuron_files/<model>/random.safetensors or else a permutation seeded
    with `seed`. Raises PartInferError if a file is needed and there is none.
    """
    if random:
        ranking = _random_ranking(folder, seed)
        return {"dataset_neurons": ranking, "model_neurons": ranking}
    paths = {"dataset_neurons": settings.dataset_neurons_filepath, "model_neurons": settings.model_neurons_filepath}
    if settings.needs_neuron_files and not any(paths.values()):
        found = find_neuron_files(folder.name, task_type)
        paths = {"dataset_neurons": found.dataset, "model_neurons": found.model}
    return {name: NeuronFile.load(path) for name, path in paths.items() if path}


def _random_ranking(folder: Path, seed: int) -> NeuronFile:
    path = NEURON_FILES / folder.name / "random.safetensors"
    if path.is_file():
        return NeuronFile.load(path)
    config = read_config(folder)
    size = ffn_spec(config).intermediate_size(config)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(size, generator=generator) for _ in range(config.num_hidden_layers)]
    return NeuronFile(torch.stack(rows).to(torch.int32), source=f"(random ranking, seed {seed})")


def load_configuration(configuration: Configuration, folder: Path, task_type: str | None, seed: int = 0) -> LoadedModel:
    """Load the model of a configuration with the neuron files that belong to it."""
    random = METHODS[configuration.method].random
    rankings = find_rankings(configuration.settings, folder, task_type, random=random, seed=seed)
    return load_model(folder, configuration.settings, **rankings)
