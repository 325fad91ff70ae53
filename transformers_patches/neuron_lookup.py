"""Which neuron files belong to a model and a task, when the user names none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers_patches.errors import PartInferError

NEURON_FILES = Path(__file__).resolve().parent.parent / "neuron_files"
TASK_TYPES = ("QA", "Summarize", "translate_de_en")
_FILE_STEMS = {"QA": "qa", "Summarize": "summarize", "translate_de_en": "translate", None: "model"}


@dataclass(frozen=True)
class NeuronFilePaths:
    """The neuron files of a run: the task's ("dataset") and the model's; either may be missing, not both."""

    dataset: Path | None
    model: Path | None


def find_neuron_files(model_name: str, task_type: str | None, folder: str | Path | None = None) -> NeuronFilePaths:
    """Look in neuron_files/<model_name>/ for the task's file and the model's, .safetensors before legacy .json.

    task_type: one of TASK_TYPES, or None for no task. Raises PartInferError if there is neither file.
    """
    place = Path(folder or NEURON_FILES) / model_name
    found = NeuronFilePaths(_first(place, _FILE_STEMS[task_type]), _first(place, _FILE_STEMS[None]))
    if found.dataset is None and found.model is None:
        raise PartInferError(
            f"no neuron files for {model_name} in {place}: make one with python -m profiler run, or give "
            "--dataset_neurons_filepath"
        )
    return found


def _first(place: Path, stem: str) -> Path | None:
    return next((p for p in (place / f"{stem}.safetensors", place / f"{stem}.json") if p.is_file()), None)
