"""A run of the fit: from texts to batches, a fit of each layer, and a FitFile, with a checkpoint after every layer."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from profiler.budget import Share
from profiler.collect import with_continuations
from profiler.fitting import FitSettings, FittedLayer, Fitter
from profiler.layerwise import Batch, LayerwiseModel, make_batches
from profiler.store import CheckpointFile, interrupts_deferred
from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.neurons.fit_file import FitFile, LayerFit

PROMPT_SHARE = 2 / 3  # share of a text without continuation that counts as prefilled; the rest counts as decoded


@dataclass(frozen=True)
class FitTexts:
    """The texts to fit on."""

    batches: list[Batch]  # of texts of similar length
    texts: int  # how many texts there are
    tokens: int  # how many tokens they have together
    digest: str  # of all token ids, to notice texts that have changed


def prepare_texts(
    model: PreTrainedModel,
    sequences: Iterable[list[int]],
    *,
    skip: int,
    limit: int | None,
    batch_size: int,
    new_tokens: int,
    quiet: bool = False,
) -> FitTexts:
    """Batches of the sequences `skip` to `skip + limit`, each with a greedy continuation of up to `new_tokens`.

    The continuation counts as decoded; without one, the last third of the text does. Raises PartInferError if there are
    no texts.
    """
    chosen = list(islice((ids for ids in sequences if ids), skip, None if limit is None else skip + limit))
    if not chosen:
        raise PartInferError("there are no texts: check --dataset, --skip and --limit")
    prompts = [len(ids) if new_tokens else max(1, round(PROMPT_SHARE * len(ids))) for ids in chosen]
    if new_tokens:
        order = sorted(range(len(chosen)), key=lambda i: (-len(chosen[i]), i))
        with torch.no_grad():
            for first in tqdm(range(0, len(order), batch_size), desc="continuing texts", leave=False, disable=quiet):
                places = order[first : first + batch_size]
                longer = with_continuations(model, [chosen[i] for i in places], new_tokens)
                for place, ids in zip(places, longer, strict=True):
                    chosen[place] = ids
    state = hashlib.sha256()
    for ids, prompt in zip(chosen, prompts, strict=True):
        state.update(array("q", [len(ids), prompt, *ids]).tobytes())
    batches = make_batches(chosen, prompts, batch_size)
    return FitTexts(batches, len(chosen), sum(len(ids) for ids in chosen), state.hexdigest())


class FitCheckpoint(CheckpointFile):
    """The state of an unfinished fit: the fits of the layers that are done, and the hidden states after them."""

    format = "partinfer-fit-checkpoint"

    def save(self, hidden: list[torch.Tensor], fits: FitFile, errors: dict, next_layer: int, settings: dict) -> None:
        """Replace the checkpoint.

        hidden: what enters `next_layer`, the first layer that is not done
        settings: everything that affects the result
        """
        tensors = {f"hidden.{i}": values.contiguous() for i, values in enumerate(hidden)} | fits.tensors()
        self._write(tensors, {"next_layer": next_layer, "errors": errors}, settings)

    def load(self, settings: dict) -> tuple[list[torch.Tensor], dict[int, LayerFit], dict, int]:
        """Hidden states, fits, errors and the next layer; PartInferError if damaged or from other settings."""
        tensors, state = self._read(settings)
        count = sum(name.startswith("hidden.") for name in tensors)
        hidden = [tensors.pop(f"hidden.{i}") for i in range(count)]
        values: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            _, number, name = key.split(".")
            values.setdefault(int(number), {})[name] = value
        fits = {number: LayerFit(**named) for number, named in sorted(values.items())}
        errors = {int(layer): pair for layer, pair in state["errors"].items()}
        return hidden, fits, errors, state["next_layer"]


@dataclass
class FitRun:
    """Fits one layer after another, continuing from a checkpoint if asked to."""

    model: PreTrainedModel  # with all neurons
    texts: FitTexts  # what it is fitted on
    layers: dict[int, Share | None]  # the sparse layers and the share of each; None: that of the settings
    fit_settings: FitSettings  # what is fitted
    ranking: torch.Tensor | None  # int [layers, N]; None: the fit chooses the neurons
    checkpoint: FitCheckpoint  # written after every layer
    settings: dict  # everything that affects the result; a resumed fit must have the same
    quiet: bool = False  # without a progress bar
    errors: dict[int, tuple[float, float]] = field(default_factory=dict)  # relative squared output error before, after

    def run(self, *, resume: bool) -> FitFile:
        """Fit all layers. Ctrl-C loses at most the layer that was being fitted."""
        size = family_of(self.model.config).intermediate_size(self.model.config)
        fits, first, last = FitFile({}, size), 0, max(self.layers)
        fitter = Fitter(LayerwiseModel(self.model), self.texts.batches, self.fit_settings)
        if resume:
            fitter.hidden, fits.layers, self.errors, first = self.checkpoint.load(self.settings)
        todo = range(first, last + 1)
        with tqdm(
            todo, initial=first, total=len(todo) + first, unit=" layers", desc="fitting", disable=self.quiet
        ) as bar:
            for layer in bar:
                if layer not in self.layers:
                    fitter.pass_through(layer)
                    continue
                fitted = fitter.fit(
                    layer, None if self.ranking is None else self.ranking[layer].long(), self.layers[layer]
                )
                _check_finite(fitted, layer)
                bar.set_postfix_str(f"error {fitted.before:.3f} -> {fitted.after:.3f}")
                with interrupts_deferred():
                    fits.layers[layer] = fitted.fit
                    self.errors[layer] = (fitted.before, fitted.after)
                    if layer < last:
                        self.checkpoint.save(fitter.hidden, fits, self.errors, layer + 1, self.settings)
        return fits


def _check_finite(fitted: FittedLayer, layer: int) -> None:
    values = [value for value in vars(fitted.fit).values() if value is not None]
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise PartInferError(f"NaN or Inf in the fit of layer {layer}: use --dtype float32 or more --ridge")
