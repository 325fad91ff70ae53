"""The settings of a run, with the neuron files that they need and do not name."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path

from transformers_patches.config import DECIDED, PartInferConfig, check_given, chooses_nothing
from transformers_patches.families import family_of
from transformers_patches.neurons.lookup import NoNeuronFiles, find_neuron_files
from transformers_patches.neurons.neuron_file import has_loss_curve, has_nothing_but_experts
from transformers_patches.plan.max_loss import (
    DEFAULT_MAX_LOSS,
    UNMEASURED,
    everything_loaded,
)
from transformers_patches.weights.file_kinds import is_pack
from transformers_patches.weights.lookup import model_names
from transformers_patches.weights.model_files import read_config
from transformers_patches.weights.pack_description import pack_settings


def settings_for(path: str | Path, given: dict, task_type: str | None) -> PartInferConfig:
    """The settings that were given, over those of a pack, with neuron files.

    given: fields of PartInferConfig by name. Raises PartInferError for settings that contradict each other, and where
    neuron files are needed and there are none.
    """
    check_given(given)
    if is_pack(path):
        return PartInferConfig(**(pack_defaults(path, given, given.get("method", "partinfer")) | given))
    settings = PartInferConfig(**given)
    if not chooses_nothing(given):
        return with_neuron_files(settings, path, task_type)
    return default_settings(settings, path, task_type)


def default_settings(settings: PartInferConfig, path: str | Path, task_type: str | None) -> PartInferConfig:
    """What is loaded and computed where that is left to the program.

    A bound on the loss where the neuron file has a curve, the documented fractions where it has none. Without neuron
    files, and with those of experts alone, everything is loaded, and tokens choose by weights and prompt. A pack keeps
    what it was made with. What can't be computed by neurons is computed dense.
    """
    if is_pack(path):
        return settings
    if why_dense(path):
        return replace(settings, method="dense", use_partial_loading=False)
    try:
        found = with_neuron_files(settings, path, task_type)
    except NoNeuronFiles:
        return everything_loaded(settings, read_config(path).num_hidden_layers, UNMEASURED)
    ranks = found.dataset_neurons_filepath or found.model_neurons_filepath
    if ranks and has_nothing_but_experts(ranks):  # of which nobody has measured what leaving neurons out costs
        return everything_loaded(found, read_config(path).num_hidden_layers, UNMEASURED)
    return replace(found, max_loss=DEFAULT_MAX_LOSS) if ranks and has_loss_curve(ranks) else found


def why_dense(path: str | Path) -> str | None:
    """Why no layer of a model can be computed by neurons; None if some can, or neurons inside of experts."""
    family = family_of(read_config(path))
    none = family.found is not None and family.found.layout is None and family.experts is None
    return family.whole_layers[0] if none else None


def pack_defaults(path: str | Path, given: Container[str], method: str) -> dict:
    """What a pack was made with, less what is given, and less the bound on the loss where that is chosen otherwise."""
    made = {name: value for name, value in pack_settings(path).items() if name not in given}
    if method != "partinfer" or any(name in given for name in DECIDED):
        made.pop("max_loss", None)
    return made


def with_neuron_files(settings: PartInferConfig, path: str | Path, task_type: str | None) -> PartInferConfig:
    """Fill in the paths of neuron files where partial loading needs them and none is named; a pack has its own.

    Where everything is loaded they are used if there are some. Raises NoNeuronFiles if they are needed and there are
    none.
    """
    named = settings.dataset_neurons_filepath or settings.model_neurons_filepath
    if named or not settings.use_partial_loading or is_pack(path):
        return settings
    try:
        found = find_neuron_files(model_names(path), task_type)
    except NoNeuronFiles:
        if settings.needs_neuron_files:
            raise
        return settings
    return replace(
        settings,
        dataset_neurons_filepath=found.dataset and str(found.dataset),
        model_neurons_filepath=found.model and str(found.model),
    )
