"""Which neuron files belong to a model and a task, when the user names none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers_patches.errors import PartInferError

NEURON_FILES = Path(__file__).resolve().parents[2] / "neuron_files"
TASK_TYPES = ("QA", "Summarize", "translate_de_en")
_MODEL_STEMS = ("model", "model_neurons")  # the second is what the original called it
# A task's own file comes before that of its group.
_TASK_STEMS = {"QA": ("qa",), "Summarize": ("summarize",), "translate_de_en": ("translate_de_en", "translate")}


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
    found = NeuronFilePaths(_first(place, _TASK_STEMS.get(task_type, ())), _first(place, _MODEL_STEMS))
    if found.dataset is None and found.model is None:
        raise PartInferError(
            f"no neuron files for {model_name} in {place}: make one with python -m profiler run, or give "
            "--dataset_neurons_filepath"
        )
    return found


def _first(place: Path, stems: tuple[str, ...]) -> Path | None:
    names = (place / f"{stem}{ending}" for stem in stems for ending in (".safetensors", ".json"))
    return next((path for path in names if path.is_file()), None)
