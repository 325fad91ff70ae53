"""From a configuration to a loaded model: which neuron files belong to it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from evaluation.methods import METHODS, Configuration
from evaluation.published.settings import PublishedSettings
from transformers_patches.config import PartInferConfig
from transformers_patches.families import family_of
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.lookup import find_random_neurons
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.neurons.random_ranking import random_ranking
from transformers_patches.plan.neuron_files import default_settings, pack_defaults, with_neuron_files
from transformers_patches.weights.file_kinds import is_gguf, is_pack
from transformers_patches.weights.lookup import model_name, model_names
from transformers_patches.weights.model_files import read_config


def model_label(path: Path) -> str:
    """What results call a model. The type of a GGUF file belongs to the name, because it makes another model."""
    return path.name if is_gguf(path) else model_name(path)


def find_rankings(settings: PartInferConfig, folder: Path, task_type: str | None) -> dict[str, NeuronFile]:
    """The neuron files of a run, as load_model takes them.

    They are those that the settings name or else, for partial loading, those of the model and task in neuron_files/.
    Raises PartInferError if one is needed and there is none.
    """
    found = with_neuron_files(settings, folder, task_type)
    paths = {"dataset_neurons": found.dataset_neurons_filepath, "model_neurons": found.model_neurons_filepath}
    return {name: NeuronFile.load(path) for name, path in paths.items() if path}


def settled(configuration: Configuration, folder: Path, task_type: str | None) -> Configuration:
    """The configuration with the settings that partinfer.py would choose, where that was left to the program."""
    if is_pack(folder) and configuration.settings.use_partial_loading:
        settings = configuration.settings
        own = pack_defaults(folder, configuration.given, settings.method)
        return replace(configuration, settings=replace(settings, **own), by_default=False)
    if not configuration.by_default:
        return configuration
    settings = default_settings(configuration.settings, folder, task_type)
    return replace(configuration, settings=settings, by_default=False)


def random_rankings(folder: Path, given: str | None, seed: int) -> dict[str, NeuronFile]:
    """The random ranking for both: a given file, neuron_files/<model>/random.safetensors, or a seeded permutation."""
    path = given or find_random_neurons(model_names(folder))
    if path:
        ranking = NeuronFile.load(path)
    else:
        config = read_config(folder)
        ranking = random_ranking(config.num_hidden_layers, family_of(config).intermediate_size(config), seed)
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
    loaded = load_model(folder, configuration.settings, **rankings)
    attach_published(loaded, configuration.published, folder, arguments.seed)
    return loaded


def attach_published(loaded: LoadedModel, settings: PublishedSettings | None, folder: Path, seed: int) -> None:
    """Let a dense model leave out what a published baseline leaves out; None: nothing. seed: of the calibration texts."""
    if settings is not None:
        from evaluation.published.attach import attach

        attach(loaded, settings, folder, seed)
