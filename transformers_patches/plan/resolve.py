"""What `auto` means for a run: the selection and compensation that its neuron and fit files allow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.fit_file import FitFile, fit_path
from transformers_patches.neurons.neuron_file import NeuronFile


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


def resolve_settings(
    settings: PartInferConfig, base: NeuronFile | None, fit: FitFile | None, num_layers: int
) -> tuple[PartInferConfig, FitFile | None]:
    """The settings without `auto`, and the fit file if it is used.

    base: the neuron file whose statistics count; num_layers: of the model. Raises PartInferError
    if a compensation is asked for that the files can't give.
    """
    if settings.method != "partinfer":
        settings = _baseline(settings)
    if settings.budget == "auto":
        settings = dataclasses.replace(settings, budget=_budget(settings, fit))
    reason = "there is none" if fit is None else _why_unfit(settings, num_layers, fit)
    usable = fit if reason is None else None
    statistics = base is not None and base.has_spread and settings.use_partial_loading
    compensation = settings.compensation
    if compensation == "auto":
        if settings.fit_filepath and reason:
            raise PartInferError(f"the fit file {settings.fit_filepath} can't be used: {reason}")
        compensation = "mean" if statistics else "none"
        if usable is not None:
            compensation = "refit"
    selection = settings.selection
    if selection == "auto":
        informed = statistics or usable is not None
        selection = ("blend" if settings.memory_limit else "up") if informed else "core"
    settings = dataclasses.replace(settings, compensation=compensation, selection=selection)
    if compensation == "refit":
        if usable is None:
            raise PartInferError(
                f"compensation refit needs a fit file made for it, but {reason}: make one with python -m profiler fit"
            )
        if settings.token_count == "auto":
            known = fit.has_thresholds(settings.selection, settings.sparsity)
            settings = dataclasses.replace(settings, token_count="average" if known else "exact")
        return settings, fit
    if compensation == "mean" and settings.use_partial_loading and not statistics:
        name = "the neuron file" if base is None else base.source
        raise PartInferError(
            f"compensation mean needs the statistics mean, mean_sq and down_norm, which {name} lacks: "
            "profile again with python -m profiler run, or use --compensation none"
        )
    if settings.token_count == "auto":
        settings = dataclasses.replace(settings, token_count="exact")
    return settings, usable if settings.budget == "per_layer" else None


def _baseline(settings: PartInferConfig) -> PartInferConfig:
    """coreinfer and dense stay what they are unless something else is asked for."""
    selection = "core" if settings.selection == "auto" else settings.selection
    compensation = "none" if settings.compensation == "auto" else settings.compensation
    return dataclasses.replace(settings, selection=selection, compensation=compensation)


def _budget(settings: PartInferConfig, fit: FitFile | None) -> str:
    """What `auto` means: the fit file's shares for the layers, where they are for what the settings ask for."""
    uses_fit = settings.compensation in ("auto", "refit")
    if settings.method != "partinfer" or fit is None or not uses_fit or not _spread_for(settings, fit):
        return "uniform"
    same_layers = settings.start_num in (None, min(fit.layers)) and settings.end_num in (None, max(fit.layers))
    return "per_layer" if same_layers else "uniform"


def _spread_for(settings: PartInferConfig, fit: FitFile) -> bool:
    """Whether a fit file has shares of every layer for the settings' sparsity."""
    return bool(fit.layer_sparsity) and abs(fit.sparsity - settings.sparsity) < 1e-6


def _why_unfit(settings: PartInferConfig, num_layers: int, fit: FitFile) -> str | None:
    """Why a fit file does not belong to these settings; None if it does."""
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
