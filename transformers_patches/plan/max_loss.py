"""A setting by what it may cost: a bound on the loss and the neuron file's curve decide what is loaded and computed."""

from __future__ import annotations

from dataclasses import replace

from transformers_patches.config import PartInferConfig, default_layers
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.loss_curve import ALL, DEFAULT, LossCurve
from transformers_patches.neurons.neuron_file import NeuronFile

DEFAULT_MAX_LOSS = 0.05  # nats per token: nearly all answers stay the same
SPOILS = 0.1  # nats per token, above which answers are visibly worse
UNMEASURED = 0.7  # share of the FFN bytes that is read where no curve says what that costs


def everything_loaded(settings: PartInferConfig, num_layers: int, sparsity: float) -> PartInferConfig:
    """The same settings with all neurons of all layers loaded, of which a token reads as many as `sparsity` says."""
    return replace(
        settings,
        loaded_neurons_percent=1.0,
        base_neurons_percent=min(settings.base_neurons_percent, sparsity),
        sparsity=sparsity,
        start_num=0,
        end_num=num_layers - 1,
        selection="up",
        token_count="average",
        compensation="none",
        budget="uniform",
    )


def within_max_loss(settings: PartInferConfig, base: NeuronFile | None, num_layers: int) -> PartInferConfig:
    """The settings that `max_loss` stands for; those without one as they are.

    base: the neuron file whose curve counts. Raises PartInferError if there is none.
    """
    if settings.max_loss is None:
        return settings
    if base is None or base.loss is None:
        name = "there is no neuron file" if base is None else f"{base.source} has none"
        raise PartInferError(
            f"--max_loss needs a loss curve, but {name}: measure it with python -m profiler loss, or give --sparsity"
        )
    return everything_loaded(settings, num_layers, base.loss.sparsity_for(settings.max_loss))


def predicted_loss(settings: PartInferConfig, curve: LossCurve | None, num_layers: int) -> float | None:
    """Nats per decoded token over dense; None if nothing near the settings was measured.

    settings: no `auto` left. What a fit saves is not counted.
    """
    if settings.method == "dense" and not settings.use_partial_loading:
        return 0.0
    if curve is None or settings.method != "partinfer" or settings.budget != "uniform":
        return None
    layers = settings.resolve_layers(num_layers)
    names = {range(num_layers): ALL, default_layers(num_layers): DEFAULT}
    if layers not in names:
        return None
    return curve.predict(settings.selection, names[layers], settings.loaded_neurons_percent, settings.sparsity)
