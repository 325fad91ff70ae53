"""What can be wrong with a command and is known without torch, whose import takes longer than all of these checks."""

from __future__ import annotations

from pathlib import Path

from transformers_patches.config import PartInferConfig, check_given, chooses_nothing
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.lookup import NEURON_FILE_MISSING, find_neuron_files
from transformers_patches.weights.file_kinds import is_pack
from transformers_patches.weights.lookup import find_model, model_names


def check_files(model: str, checkpoint_path: str | None, given: dict, task_type: str) -> Path:
    """The model's folder or file. Raises PartInferError if it, or a neuron file that is needed, is not there.

    given: fields of PartInferConfig by name.
    """
    folder = find_model(model, checkpoint_path)
    check_given(given)
    named = [path for name in ("dataset_neurons_filepath", "model_neurons_filepath") if (path := given.get(name))]
    missing = next((path for path in named if not Path(path).exists()), None)
    if missing is not None:
        raise PartInferError(NEURON_FILE_MISSING.format(missing))
    settings = PartInferConfig(**given)
    if not (named or is_pack(folder) or chooses_nothing(given)) and settings.needs_neuron_files:
        find_neuron_files(model_names(folder), task_type)
    return folder
