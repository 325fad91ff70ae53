"""From a configuration to a loaded model: where the checkpoint is, and which neuron files belong to it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from downloads.catalog import model_folder
from evaluation.methods import METHODS, Configuration
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.load.loader import LoadedModel, load_model, read_config
from transformers_patches.neurons.lookup import NEURON_FILES, find_neuron_files
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.weights.gguf_file import is_gguf
from transformers_patches.weights.model_files import model_name
from transformers_patches.weights.pack_description import is_pack

ROOT = Path(__file__).resolve().parent.parent


def find_model(name: str) -> Path:
    """The checkpoint folder or GGUF file of a model: a path, a name in models/, a short name or hub id that download.py knows.

    Raises PartInferError if there is none.
    """
    given = Path(name)
    if is_gguf(given) and given.is_file():
        return given.resolve()
    places = [given] if given.is_absolute() else [given, ROOT / "models" / name]
    folder = next((place for place in places if (place / "config.json").is_file()), None)
    if folder is None and not given.is_absolute() and not given.is_dir():
        folder = ROOT / model_folder(name)
    if folder is None or not (folder / "config.json").is_file():
        raise PartInferError(f"no model at {folder or given}: fetch one with python download.py --model_name NAME")
    return folder.resolve()


def find_rankings(settings: PartInferConfig, folder: Path, task_type: str | None) -> dict[str, NeuronFile]:
    """The neuron files of a run, as load_model takes them: those the settings name, or else, for partial loading,
    those of the model and task in neuron_files/. Raises PartInferError if one is needed and there is none.
    """
    paths = {"dataset_neurons": settings.dataset_neurons_filepath, "model_neurons": settings.model_neurons_filepath}
    if is_pack(folder) and not any(paths.values()):
        return {}  # it has its own
    if settings.needs_neuron_files and not any(paths.values()):
        found = find_neuron_files(model_name(folder), task_type)
        paths = {"dataset_neurons": found.dataset, "model_neurons": found.model}
    return {name: NeuronFile.load(path) for name, path in paths.items() if path}


def random_rankings(folder: Path, given: str | None, seed: int) -> dict[str, NeuronFile]:
    """The random ranking for both: a given file, neuron_files/<model>/random.safetensors, or a seeded permutation."""
    path = Path(given) if given else NEURON_FILES / model_name(folder) / "random.safetensors"
    if given or path.is_file():
        ranking = NeuronFile.load(path)
    else:
        config = read_config(folder)
        size = family_of(config).intermediate_size(config)
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(size, generator=generator) for _ in range(config.num_hidden_layers)]
        ranking = NeuronFile(torch.stack(rows).to(torch.int32), source=f"(random ranking, seed {seed})")
    return {"dataset_neurons": ranking, "model_neurons": ranking}


def rankings_of(
    configuration: Configuration, folder: Path, task_type: str | None, arguments: argparse.Namespace
) -> dict[str, NeuronFile]:
    """The neuron files that a configuration is loaded with. arguments: --random_neurons_filepath and --seed."""
    if METHODS[configuration.method].random:
        return random_rankings(folder, arguments.random_neurons_filepath, arguments.seed)
    return find_rankings(configuration.settings, folder, task_type)


def load_configuration(configuration: Configuration, folder: Path, arguments: argparse.Namespace) -> LoadedModel:
    """Load the model of a configuration. arguments: --task_type, --random_neurons_filepath and --seed."""
    rankings = rankings_of(configuration, folder, arguments.task_type, arguments)
    return load_model(folder, configuration.settings, **rankings)
