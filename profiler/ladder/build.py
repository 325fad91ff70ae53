"""make_ladder(): texts -> gradients -> options of every layer -> rungs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from profiler.ladder.allocation import allocate
from profiler.ladder.capture import capture, shortened
from profiler.ladder.layer import float_layer
from profiler.ladder.options import Option, layer_options
from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.neurons.byte_ladder import INPUTS, THRESHOLDS, ByteLadder, Rung

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)  # shares of the decoder layers' bytes
_GROUPS = 3  # of a layer: q, k and v; o; the FFN
_APART = 1e-3  # the least difference of bytes between two rungs


def _check(model: PreTrainedModel) -> None:
    """Raise PartInferError if a model can't have a ladder."""
    family, kind = family_of(model.config), model.config.model_type
    if family.found is not None:
        raise PartInferError(f"no byte ladder: {kind} has no entry in transformers_patches/families.py")
    if not family.gated:
        raise PartInferError(
            f"no byte ladder: {kind} has plain FFNs, whose neurons can't be chosen before they are computed"
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise PartInferError("no byte ladder: the model does not fit in memory as a whole")


def make_ladder(
    model: PreTrainedModel, sequences: list[list[int]], budgets: Sequence[float] = BUDGETS, *, quiet: bool = False
) -> ByteLadder:
    """The ladder of a model, with predicted losses for both NLL and KL.

    sequences: token ids of calibration texts, of which as many are used as are needed.
    budgets: shares of bytes, falling.

    Raises PartInferError for plain FFNs, where no text is long enough, and where numbers are not finite.
    """
    _check(model)
    texts = shortened(sequences)
    if not texts:
        raise PartInferError("no byte ladder: no text has three tokens")
    seen = capture(model, texts, quiet=quiet)
    groups, mean, norm = [], {name: [] for name in INPUTS}, {name: [] for name in INPUTS}
    for number in tqdm(range(len(seen)), "options", unit=" layers", disable=quiet):
        with torch.no_grad():
            layer = float_layer(model, number, seen[number])
            options = layer_options(layer)
        if not all(math.isfinite(option.loss) for group in options for option in group):
            raise PartInferError(
                f"no byte ladder: gradients of layer {number} are not finite, use --dtype bfloat16 or float32"
            )
        groups += options
        seen[number] = None  # frees the layer's part of the tokens
        for name in INPUTS:
            mean[name].append(layer.mean[name].cpu())
            norm[name].append(layer.norm[name].cpu())
    return ladder_of(groups, budgets, _stacked(mean), _stacked(norm))


def _stacked(rows: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """[layers, in] by name, in the widest type of the rows."""
    widest = {name: max((row.dtype for row in of), key=lambda dtype: dtype.itemsize) for name, of in rows.items()}
    return {name: torch.stack([row.to(widest[name]) for row in of]) for name, of in rows.items()}


def ladder_of(
    groups: list[list[Option]],
    budgets: Sequence[float],
    mean: dict[str, torch.Tensor],
    norm: dict[str, torch.Tensor],
) -> ByteLadder:
    """The rungs for some budgets. groups: three for each layer; the first option of each reads everything."""
    total = sum(options[0].weights for options in groups)
    rungs, picked = [], []
    for budget in budgets:
        chosen = allocate(groups, budget * total)
        if chosen is None:
            break
        share, loss = sum(option.weights for option in chosen) / total, sum(option.loss for option in chosen)
        if not rungs or share < rungs[-1].block_bytes - _APART:
            rungs.append(Rung(share, loss, loss))
            picked.append(chosen)
    if not rungs:
        raise PartInferError(f"no byte ladder: nothing reads as few bytes as {min(budgets, default=0):g} of all")
    thresholds = {
        name: torch.tensor([[_threshold(layer, name) for layer in _layers(chosen)] for chosen in picked])
        for name in THRESHOLDS
    }
    neurons = torch.tensor([[layer[-1].neurons for layer in _layers(chosen)] for chosen in picked])
    return ByteLadder(rungs, mean, norm, thresholds, neurons)


def _layers(chosen: list[Option]) -> list[list[Option]]:
    """The options by layer."""
    return [chosen[first : first + _GROUPS] for first in range(0, len(chosen), _GROUPS)]


def _threshold(layer: list[Option], name: str) -> float:
    return next(option.thresholds[name] for option in layer if name in option.thresholds)
