"""What `auto` means for settings that neuron file and fit file decide: one function for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.fit_file import FitFile, fit_path
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.decision import GIVEN, Decision

METHODS_OWN = "part of the method"  # coreinfer and dense stay what they are unless something else is asked for


@dataclass(frozen=True)
class RunFiles:
    """The files of a run besides the model's."""

    dataset_neurons: NeuronFile | None = None  # the task's
    model_neurons: NeuronFile | None = None  # the model's
    fit: FitFile | None = None  # as found; whether it is used is decided later

    @classmethod
    def of(
        cls,
        settings: PartInferConfig,
        dataset_neurons: NeuronFile | None = None,
        model_neurons: NeuronFile | None = None,
    ) -> RunFiles:
        """Neuron files that are not given are read from the paths in the settings; the fit file is found."""
        if dataset_neurons is None and settings.dataset_neurons_filepath:
            dataset_neurons = NeuronFile.load(settings.dataset_neurons_filepath)
        if model_neurons is None and settings.model_neurons_filepath:
            model_neurons = NeuronFile.load(settings.model_neurons_filepath)
        return cls(dataset_neurons, model_neurons, find_fit(settings, dataset_neurons, model_neurons))

    @property
    def neurons(self) -> list[NeuronFile]:
        return [file for file in (self.dataset_neurons, self.model_neurons) if file is not None]

    def base(self, settings: PartInferConfig) -> NeuronFile | None:
        """The neuron file that ranks base neurons, and whose statistics count."""
        given = self.neurons
        return None if not given else given[-1] if settings.base_neurons_type == "model" else given[0]


def find_fit(settings: PartInferConfig, *neurons: NeuronFile | None) -> FitFile | None:
    """The fit file that the settings name, or the one beside the first neuron file that has one.

    None where there is none, and where the settings need none. Raises PartInferError for a damaged file.
    """
    if settings.fit_filepath:
        return FitFile.load(settings.fit_filepath)
    wanted = settings.compensation in ("auto", "refit") or settings.budget == "per_layer"
    if settings.method != "partinfer" or not wanted:
        return None
    places = [fit_path(file.source) for file in neurons if file is not None]
    found = next((place for place in places if Path(place).is_file()), None)
    return None if found is None else FitFile.load(found)


def resolve_by_files(
    settings: PartInferConfig, files: RunFiles, num_layers: int
) -> tuple[dict[str, Decision], FitFile | None]:
    """What is decided about budget, compensation, selection and token_count, and the fit file if it is used.

    Raises PartInferError if a compensation is asked for that the files can't give.
    """
    base = files.base(settings)
    statistics = base is not None and base.has_spread and settings.use_partial_loading
    budget = decide_budget(settings, files.fit)
    settings = replace(settings, budget=budget.value)
    unfit = why_unfit(settings, num_layers, files.fit)
    fit = files.fit if unfit is None else None
    compensation = decide_compensation(settings, fit, unfit, statistics=statistics)
    settings = replace(settings, compensation=compensation.value)
    if compensation.value == "refit" and fit is None:
        raise PartInferError(
            f"compensation refit needs a fit file made for it, but {unfit}: make one with python -m profiler fit"
        )
    if compensation.value == "mean" and settings.use_partial_loading and not statistics:
        name = "the neuron file" if base is None else base.source
        raise PartInferError(
            f"compensation mean needs the statistics mean, mean_sq and down_norm, which {name} lacks: "
            "profile again with python -m profiler run, or use --compensation none"
        )
    selection = decide_selection(settings, informed=statistics or fit is not None)
    if selection.value == "similarity" and (base is None or base.clusters is None):
        name = "there is no neuron file" if base is None else f"{base.source} has none"
        raise PartInferError(
            f"selection similarity needs clusters of texts, but {name}: add them with python -m profiler cluster"
        )
    used = fit if compensation.value == "refit" or budget.value == "per_layer" else None
    fitted = fit if compensation.value == "refit" else None
    token_count = decide_token_count(replace(settings, selection=selection.value), fitted)
    decided = {"budget": budget, "compensation": compensation, "selection": selection, "token_count": token_count}
    return decided, used


def decide_budget(settings: PartInferConfig, fit: FitFile | None) -> Decision:
    """`per_layer` if the fit file has shares for the layers, for what the settings ask for."""
    if settings.budget != "auto":
        return Decision(settings.budget, GIVEN)
    if settings.method != "partinfer":
        return Decision("uniform", METHODS_OWN)
    if fit is None or settings.compensation not in ("auto", "refit"):
        return Decision("uniform", "no fit file is used")
    if not _spread_for(settings, fit):
        return Decision("uniform", f"{fit.source} has no shares of layers for sparsity {settings.sparsity:g}")
    if settings.start_num in (None, min(fit.layers)) and settings.end_num in (None, max(fit.layers)):
        return Decision("per_layer", f"{fit.source} has shares of layers for this sparsity")
    return Decision("uniform", f"{fit.source} has shares of other layers")


def decide_compensation(
    settings: PartInferConfig, fit: FitFile | None, unfit: str | None, *, statistics: bool
) -> Decision:
    """`refit` with a fit file, else `mean` with a neuron file's statistics, unless tokens choose among all neurons.

    fit: a fit file that belongs to the settings; unfit: why there is none. Raises PartInferError if a fit file was
    named that can't be used.
    """
    if settings.compensation != "auto":
        return Decision(settings.compensation, GIVEN)
    if settings.method != "partinfer":
        return Decision("none", METHODS_OWN)
    if settings.fit_filepath and unfit:
        raise PartInferError(f"the fit file {settings.fit_filepath} can't be used: {unfit}")
    if fit is not None:
        return Decision("refit", f"{fit.source} was made for these settings")
    if settings.loaded_neurons_percent == 1 and settings.selection in ("auto", "up", "gate"):
        return Decision("none", "everything is loaded, and tokens choose among it")
    if statistics:
        return Decision("mean", "the neuron file has statistics")
    return Decision("none", "the neuron file has no statistics")


def decide_selection(settings: PartInferConfig, *, informed: bool) -> Decision:
    """What chooses the neurons.

    informed: whether there are statistics or a fit file.
    """
    if settings.selection != "auto":
        return Decision(settings.selection, GIVEN)
    if settings.method != "partinfer":
        return Decision("core", METHODS_OWN)
    whole = not settings.use_partial_loading or settings.loaded_neurons_percent == 1
    if not informed and (not whole or settings.memory_limit):
        return Decision("core", "the neuron file has no statistics")
    if settings.memory_limit:
        return Decision("blend", "with --memory_limit neurons are chosen once per prompt")
    return Decision("up", "the neuron file has statistics" if informed else "everything is loaded")


def decide_token_count(settings: PartInferConfig, fit: FitFile | None) -> Decision:
    """`average` if the fit file has thresholds.

    settings: selection decided.
    fit: None if it is not used.
    """
    if settings.token_count != "auto":
        return Decision(settings.token_count, GIVEN)
    if fit is not None and fit.has_thresholds(settings.selection, settings.sparsity):
        return Decision("average", f"{fit.source} has thresholds for these settings")
    return Decision("exact", "no fit file has thresholds for these settings")


def why_unfit(settings: PartInferConfig, num_layers: int, fit: FitFile | None) -> str | None:
    """Why a fit file does not belong to settings whose budget is decided; None if it does."""
    if fit is None:
        return "there is none"
    if not settings.use_partial_loading:
        return "nothing is left out of loading"
    if abs(fit.loaded_neurons_percent - settings.loaded_neurons_percent) > 1e-6:
        return (
            f"{fit.source} was made for loaded_neurons_percent {fit.loaded_neurons_percent:g}, "
            f"not {settings.loaded_neurons_percent:g}"
        )
    if settings.budget == "uniform" and fit.layer_sparsity:
        return f"{fit.source} has shares of every layer for sparsity {fit.sparsity:g} (--budget per_layer, all layers)"
    if settings.budget == "uniform" and sorted(fit.layers) != list(settings.resolve_layers(num_layers)):
        return f"{fit.source} was made for other layers"
    if settings.budget == "per_layer" and fit.layer_sparsity and not _spread_for(settings, fit):
        return f"{fit.source} has shares of every layer for sparsity {fit.sparsity:g}, not {settings.sparsity:g}"
    return None


def _spread_for(settings: PartInferConfig, fit: FitFile) -> bool:
    """Whether a fit file has shares of every layer for the settings' sparsity."""
    return bool(fit.layer_sparsity) and abs(fit.sparsity - settings.sparsity) < 1e-6
