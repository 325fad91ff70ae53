"""Makes a loaded dense model read what a published baseline reads.

Prompts are computed whole, as this project's methods do. So only decoded tokens, and those that are scored after a
prompt, leave something out. The papers' own tables also leave it out of prompts: CATS of all tokens, TEAL of a text's
second half, WINA of all but the first 1 %.
"""

from __future__ import annotations

from pathlib import Path

import torch

from evaluation.published.block_wise import RuleAt, allocate
from evaluation.published.calibration import calibration_ids, watch
from evaluation.published.masks import Mask, MaskedReading, Rule, above, largest
from evaluation.published.projections import FFN, NAMES, SOURCE, LayerParts, float_weight, nbytes, parts_of
from evaluation.published.rotation import ORTHOGONAL, rotate
from evaluation.published.settings import ALLOCATED, CALIBRATED, CATS, ROTATED, TEAL, TEAL_UNIFORM, PublishedSettings
from transformers_patches.load.loaded_model import LoadedModel


def attach(loaded: LoadedModel, settings: PublishedSettings, folder: Path, seed: int) -> None:
    """Leave out of a dense model what a baseline leaves out.

    folder: the model's, for its tokenizer
    seed: of the calibration windows

    Raises PartInferError for models that the baselines are not for, and for calibration texts that can't be read.
    """
    layers = parts_of(loaded)
    masks = _cats(loaded, layers, settings, folder, seed) if settings.name == CATS else None
    if masks is None:
        masks = _by_input(loaded, layers, settings, folder, seed)
    loaded.masked = MaskedReading(masks, sum(nbytes(parts.projections[name]) for parts in layers for name in FFN))


def _cats(
    loaded: LoadedModel, layers: list[LayerParts], settings: PublishedSettings, folder: Path, seed: int
) -> list[Mask]:
    """Neurons with |act(gate x)| above their layer's threshold; rows of up and down are read for those only."""
    ids = calibration_ids(settings, folder, loaded, seed)
    found = watch(loaded, ids, {}, {str(number): parts.activation for number, parts in enumerate(layers)})
    masks = []
    for number, parts in enumerate(layers):
        mask = Mask(loaded.state, sum(nbytes(parts.projections[name]) for name in ("up", "down")), in_ffn=True)
        mask.rule = above(found[str(number)].quantile(settings.sparsity))
        mask.on_output(parts.activation)
        masks.append(mask)
    return masks


def _by_input(
    loaded: LoadedModel, layers: list[LayerParts], settings: PublishedSettings, folder: Path, seed: int
) -> list[Mask]:
    """TEAL and WINA: every projection leaves out inputs of its own."""
    if settings.name in ROTATED:
        rotate(layers)
    masks = [
        {
            name: Mask(loaded.state, nbytes(projection), in_ffn=name in FFN)
            for name, projection in parts.projections.items()
        }
        for parts in layers
    ]
    for parts, mine in zip(layers, masks, strict=True):
        for name, projection in parts.projections.items():
            mine[name].on_input(projection)
    ids = calibration_ids(settings, folder, loaded, seed) if settings.name in CALIBRATED else None
    rule_at = _thresholds(loaded, layers, ids) if settings.name in (TEAL, TEAL_UNIFORM) else _counts(layers, settings)
    shares = [dict.fromkeys(NAMES, settings.sparsity)] * len(layers)
    if settings.name in ALLOCATED:
        shares = allocate(loaded, layers, masks, rule_at, settings, ids)
    rules = [{name: rule_at(number, name, mine[name]) for name in NAMES} for number, mine in enumerate(shares)]
    for mine, chosen in zip(masks, rules, strict=True):
        for name, rule in chosen.items():
            mine[name].rule = rule
    return [mask for mine in masks for mask in mine.values()]


def _counts(layers: list[LayerParts], settings: PublishedSettings) -> RuleAt:
    """WINA: as many inputs as the share leaves, those with the largest |x_j| times the norm of the weight's column.

    In the turned basis the norms are those of k and gate only, and 1 elsewhere, as in the paper's experiments.
    """
    weighted = ORTHOGONAL if settings.name in ROTATED else NAMES
    norms = [
        {name: float_weight(projection).norm(dim=0) if name in weighted else None for name, projection in found.items()}
        for found in (parts.projections for parts in layers)
    ]

    def rule_at(layer: int, name: str, share: float) -> Rule:
        inputs = layers[layer].projections[name].in_features
        return largest(max(1, round((1 - share) * inputs)), norms[layer][name])

    return rule_at


def _thresholds(loaded: LoadedModel, layers: list[LayerParts], ids: torch.Tensor) -> RuleAt:
    """TEAL: inputs whose size is above a threshold, the quantile of the calibration tokens' at the share."""
    watched = {
        f"{number} {name}": parts.projections[name]
        for number, parts in enumerate(layers)
        for name in dict.fromkeys(SOURCE.values())
    }
    found = watch(loaded, ids, watched, {})
    return lambda layer, name, share: above(found[f"{layer} {SOURCE[name]}"].quantile(share))
