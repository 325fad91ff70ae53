"""Rounds a model's linear layers, layer by layer: the inputs of each are those that the rounded layers below it give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from profiler.layerwise import Batch, LayerwiseModel
from profiler.rounding.feedback import rounded
from transformers_patches import kernels
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.kernels.formats import SymmetricFormat, WeightFormat
from transformers_patches.kernels.quantization import column_scales
from transformers_patches.load.column_weights import relative
from transformers_patches.weights.source import largest_in_columns


@dataclass(frozen=True)
class _Linear:
    """One weight of a layer to round.

    name: of the module inside the layer.
    by_neuron: whether it is stored by input: the down projection of neurons.
    """

    name: str
    by_neuron: bool = False


class RoundingRun:
    """Rounds the weights of one model after another layer on the same texts.

    model: with all weights as floats; each layer's are replaced by what was rounded.
    batches: the texts.
    weight_format: int8 or int4.
    """

    def __init__(self, model: LayerwiseModel, batches: list[Batch], weight_format: WeightFormat) -> None:
        if not isinstance(weight_format, SymmetricFormat):
            raise PartInferError(f"{weight_format.name} has no whole numbers to choose")
        self.model, self.batches, self.format = model, batches, weight_format
        self.family = model.family

    def run(self, *, quiet: bool = False) -> dict[str, QuantizedTensor]:
        """The rounded weights, by their names in the model. Progress on the standard error unless quiet."""
        hidden = [self.model.inputs(batch) for batch in self.batches]
        weights: dict[str, QuantizedTensor] = {}
        for layer in tqdm(range(len(self.model.layers)), unit=" layers", desc="rounding", disable=quiet):
            wanted = self._wanted(layer)
            moments = self._moments(layer, hidden, wanted)
            for linear in wanted:
                packed = self._rounded(layer, linear, moments[linear.name])
                weights[f"{self.family.layers}.{layer}.{linear.name}.weight"] = packed
            hidden = [self.model.run(layer, states) for states in hidden]
        return weights

    def _wanted(self, layer: int) -> list[_Linear]:
        """The linear layers whose columns make up whole groups."""
        inside = self.model.layers[layer]
        down = self.family.in_ffn(self.family.down) if self.family.has_neurons(layer) else None
        found = []
        for name, module in inside.named_modules():
            if isinstance(module, nn.Linear) and module.weight.ndim == 2:
                linear = _Linear(name, by_neuron=name == down)
                columns = module.out_features if linear.by_neuron else module.in_features
                if columns % self.format.group == 0:
                    found.append(linear)
        return found

    def _moments(self, layer: int, hidden: list[torch.Tensor], wanted: list[_Linear]) -> dict[str, torch.Tensor]:
        """E[x xᵀ] of the inputs of linear layers, float32 [C, C]; those with the same input have the same tensor."""
        sums: dict[str, torch.Tensor] = {}
        with self._watched(layer, wanted, sums) as watch:
            for batch, states in zip(self.batches, hidden, strict=True):
                watch(batch.real)
                self.model.run(layer, states)
        for linear in wanted:  # an expert that no token has chosen
            inputs = self.model.layers[layer].get_submodule(linear.name).in_features
            sums.setdefault(linear.name, torch.eye(inputs))
        return sums

    @contextmanager
    def _watched(self, layer: int, wanted: list[_Linear], sums: dict[str, torch.Tensor]) -> Iterator:
        """Within the block, passes add to `sums`. Gives what has to be told which tokens [B, T] are real."""
        real: list[torch.Tensor] = []
        last: list = [None, None]  # an input and its product, which several projections share

        def look(name: str):
            def add(_: nn.Module, given: tuple) -> None:
                x = given[0]
                if x is not last[0]:
                    values = x.flatten(0, -2)[real[-1].flatten()] if x.ndim == 3 else x
                    values = values.float()
                    last[:] = x, values.T @ values
                if name in sums:
                    sums[name] += last[1]
                else:
                    sums[name] = last[1].clone()

            return add

        inside = self.model.layers[layer]
        handles = [inside.get_submodule(one.name).register_forward_pre_hook(look(one.name)) for one in wanted]
        try:
            yield real.append
        finally:
            for handle in handles:
                handle.remove()

    def _rounded(self, layer: int, linear: _Linear, moment: torch.Tensor) -> QuantizedTensor:
        """Round one weight, and put what it stands for into the model."""
        module = self.model.layers[layer].get_submodule(linear.name)
        weight = module.weight.data.float()
        packed = (
            by_neuron(weight.T, moment, self.format) if linear.by_neuron else by_output(weight, moment, self.format)
        )
        values = kernels.dequantize(packed)
        module.weight.data.copy_(values.T if linear.by_neuron else values)
        return packed


def by_output(weight: torch.Tensor, moment: torch.Tensor, weight_format: SymmetricFormat) -> QuantizedTensor:
    """A weight float32 [R, C] in rows of outputs, rounded for inputs with E[x xᵀ] = moment [C, C]."""
    packed = kernels.quantize(weight.contiguous(), weight_format, relative(moment.diagonal()))
    scales = packed.scales.float().repeat_interleave(weight_format.group, 1)
    numbers = rounded(weight.T, scales.T, moment, weight_format.lowest, weight_format.highest)
    return _with_numbers(packed, numbers.T)


def by_neuron(weight: torch.Tensor, moment: torch.Tensor, weight_format: SymmetricFormat) -> QuantizedTensor:
    """A down projection float32 [N, H] in rows of neurons, rounded for activations with E[h hᵀ] = moment [N, N]."""
    columns = column_scales(largest_in_columns(weight))
    packed = kernels.quantize(weight.contiguous(), weight_format, None, columns)
    scales = packed.scales.float().repeat_interleave(weight_format.group, 1)
    numbers = rounded(weight / columns, scales, moment, weight_format.lowest, weight_format.highest)
    return _with_numbers(packed, numbers)


def _with_numbers(packed: QuantizedTensor, numbers: torch.Tensor) -> QuantizedTensor:
    weight_format = packed.format
    groups = numbers.float().contiguous().view(len(packed), -1, weight_format.group)
    return QuantizedTensor(weight_format.pack(groups), packed.scales, weight_format, packed.column_scales)
