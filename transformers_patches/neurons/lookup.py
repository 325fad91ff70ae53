"""Which neuron files belong to a model and a task, when the user names none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers_patches.errors import PartInferError
from transformers_patches.files import shipped

OWN_NEURON_FILES = Path("neuron_files")  # where the profiler writes; they come before those that ship with the project
NEURON_FILE_MISSING = "no neuron file at {}: make one with python -m profiler run"
TASK_TYPES = ("QA", "Summarize", "translate_de_en")
_MODEL_STEMS = ("model", "model_neurons")  # the second is the original's name for it
# A task's own file comes before that of its group.
_TASK_STEMS = {"QA": ("qa",), "Summarize": ("summarize",), "translate_de_en": ("translate_de_en", "translate")}


class NoNeuronFiles(PartInferError):
    """A model has no neuron files."""


@dataclass(frozen=True)
class NeuronFilePaths:
    """The neuron files of a run. Either may be missing, but not both."""

    dataset: Path | None  # the task's
    model: Path | None  # the model's


def own_neuron_file(model_name: str, stem: str) -> Path:
    """Where a new neuron file of a model goes, and is found again: neuron_files/<model>/<stem>.safetensors."""
    return OWN_NEURON_FILES / model_name / f"{stem}.safetensors"


def find_neuron_files(model_names: Sequence[str], task_type: str | None) -> NeuronFilePaths:
    """Look in neuron_files/<model>/ for the task's file and the model's, .safetensors before legacy .json.

    model_names: what the model is called; the first name that has files counts.
    task_type: one of TASK_TYPES, or None for no task.

    Raises NoNeuronFiles if there is neither file.
    """
    for name in model_names:
        found = NeuronFilePaths(_first(name, _TASK_STEMS.get(task_type, ())), _first(name, _MODEL_STEMS))
        if found.dataset or found.model:
            return found
    raise NoNeuronFiles(
        f"no neuron files for {model_names[0]} in {OWN_NEURON_FILES}/: make one with python -m profiler run, or give "
        "--dataset_neurons_filepath"
    )


def find_random_neurons(model_names: Sequence[str]) -> Path | None:
    """The random ranking among a model's neuron files, if there is one."""
    return next((path for name in model_names if (path := _first(name, ("random",)))), None)


def _first(model_name: str, stems: tuple[str, ...]) -> Path | None:
    places = (OWN_NEURON_FILES / model_name, shipped("neuron_files") / model_name)
    names = (place / f"{stem}{end}" for stem in stems for place in places for end in (".safetensors", ".json"))
    return next((path for path in names if path.is_file()), None)
