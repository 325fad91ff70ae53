"""TEAL's allocation: which projections of a layer leave out more, found greedily, layer by layer (arXiv 2408.14690).

WINA takes the same one, with its own choice of inputs.

Every layer leaves out the same share of its bytes. Starting from nothing, the projection whose next step changes the
layer's output least (by the 2-norm, on inputs of the dense model) takes that step, until the share is reached. A step
is the same number of bytes for all projections: 5 % of the query's, as in the authors' program, whose error is that of the last
quarter of longer texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from evaluation.published.calibration import hooked
from evaluation.published.masks import Mask, Rule
from evaluation.published.projections import LayerParts, nbytes
from evaluation.published.settings import PublishedSettings
from transformers_patches.load.loaded_model import LoadedModel

SEARCH_TOKENS = 128  # of the calibration texts; the search runs a layer on them hundreds of times

RuleAt = Callable[[int, str, float], Rule]  # layer, projection, the share that it leaves out


def allocate(
    loaded: LoadedModel,
    layers: list[LayerParts],
    masks: list[dict[str, Mask]],
    rule_at: RuleAt,
    settings: PublishedSettings,
    ids: torch.Tensor,
) -> list[dict[str, float]]:
    """For each layer, the share of its inputs that each projection leaves out; over its weights their mean is the asked one.

    masks: of each layer's projections; rules are tried in them, and taken out again
    ids: calibration texts [texts, tokens]
    """
    texts = ids[: max(1, SEARCH_TOKENS // ids.shape[1]), :SEARCH_TOKENS]
    calls = _layer_calls(loaded, [parts.layer for parts in layers], texts)
    found = []
    for number, parts in enumerate(tqdm(layers, desc="Allocating", leave=False)):
        sizes = {name: nbytes(projection) for name, projection in parts.projections.items()}
        found.append(_greedy(_Layer(parts.layer, calls[number], masks[number], rule_at, number), sizes, settings))
    return found


class _Layer:
    """One layer, its dense output, and how far others are from it. In float32, which CPUs without AMX multiply faster."""

    def __init__(self, layer: nn.Module, call: tuple, masks: dict[str, Mask], rule_at: RuleAt, number: int) -> None:
        self.layer, self.call = copy.deepcopy(layer).float(), _in_float32(call)  # its hooks stay the layer's own
        self.masks, self.rule_at, self.number = masks, rule_at, number
        self.dense = self._output()

    @torch.inference_mode()
    def _output(self) -> torch.Tensor:
        arguments, options = self.call
        output = self.layer(*arguments, **options)
        return (output[0] if isinstance(output, tuple) else output).float()

    def error(self, shares: dict[str, float]) -> float:
        """The 2-norm of the output's change where each projection leaves out a share."""
        for name, mask in self.masks.items():
            mask.forced, mask.rule = True, self.rule_at(self.number, name, shares[name])
        try:
            return float((self._output() - self.dense).norm())
        finally:
            for mask in self.masks.values():
                mask.forced, mask.rule = False, None


def _in_float32(content):
    """Tensors in tuples and dictionaries, floats as float32."""
    if isinstance(content, torch.Tensor):
        return content.float() if content.is_floating_point() else content
    if isinstance(content, tuple):
        return tuple(map(_in_float32, content))
    if isinstance(content, dict):
        return {name: _in_float32(value) for name, value in content.items()}
    return content


def _greedy(layer: _Layer, sizes: dict[str, int], settings: PublishedSettings) -> dict[str, float]:
    """The shares of one layer. The last step is shortened, so that the layer's share is met."""
    total, shares = sum(sizes.values()), dict.fromkeys(sizes, 0.0)
    left = settings.sparsity * total  # bytes that are still to be left out
    while left > 1e-9 * total:
        step = min(settings.step * sizes["q"], left)
        tried = {name: min(1.0, shares[name] + step / size) for name, size in sizes.items() if shares[name] < 1}
        best = min(tried, key=lambda name: layer.error(shares | {name: tried[name]}))
        left -= (tried[best] - shares[best]) * sizes[best]
        shares[best] = tried[best]
    return shares


@torch.inference_mode()
def _layer_calls(loaded: LoadedModel, layers: list[nn.Module], ids: torch.Tensor) -> list[tuple[tuple, dict]]:
    """What each layer of the dense model is called with for texts ids."""
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def keep(module: nn.Module, arguments: tuple, options: dict) -> None:
        calls[module] = (arguments, options)

    with hooked([layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]):
        loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return [calls[layer] for layer in layers]
