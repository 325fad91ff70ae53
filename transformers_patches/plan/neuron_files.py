"""The settings of a run, with the neuron files that they need and do not name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers_patches.config import PartInferConfig
from transformers_patches.neurons.lookup import find_neuron_files
from transformers_patches.weights.lookup import model_names
from transformers_patches.weights.pack_description import is_pack, pack_settings


def settings_for(path: str | Path, given: dict, task_type: str | None) -> PartInferConfig:
    """The settings that were given, over those of a pack, with neuron files.

    given: fields of PartInferConfig by name. Raises PartInferError for settings that contradict each other, and where
    neuron files are needed and there are none.
    """
    if is_pack(path):
        return PartInferConfig(**(pack_settings(path) | given))
    return with_neuron_files(PartInferConfig(**given), path, task_type)


def with_neuron_files(settings: PartInferConfig, path: str | Path, task_type: str | None) -> PartInferConfig:
    """Fill in the paths of neuron files where partial loading needs them and none is named; a pack has its own.

    Raises PartInferError if there are none.
    """
    named = settings.dataset_neurons_filepath or settings.model_neurons_filepath
    if named or not settings.needs_neuron_files or is_pack(path):
        return settings
    found = find_neuron_files(model_names(path), task_type)
    return replace(
        settings,
        dataset_neurons_filepath=found.dataset and str(found.dataset),
        model_neurons_filepath=found.model and str(found.model),
    )
