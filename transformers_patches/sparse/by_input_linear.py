"""ByInputLinear: a linear layer of which decoded tokens read only the inputs that matter.

What an input x_j adds to the output is (x_j - mean_j) times column j of the weight, around the product with the mean.
Inputs near their mean are left out: by size as TEAL does (arXiv 2408.14690), by size times the norm of the column as WINA
does (2505.19427), around the mean as SCAP does (2412.07174). The weight is stored by input, [in, out], so that what is
left out are whole rows of memory. Prompts are computed whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.kernels import ByInput, QuantizedTensor, Weight, WeightFormat
from transformers_patches.modules.fast_linear import FEW_TOKENS, combine
from transformers_patches.modules.quantized import QuantizedWeight, weight_of
from transformers_patches.neurons.byte_ladder import InputChoice
from transformers_patches.sparse.request import PREFILL, RequestState


@dataclass(slots=True)
class InputCounters:
    """What decoding has read since the last reset."""

    tokens: int = 0
    inputs: int = 0  # summed over the tokens


@dataclass(frozen=True)
class Joined:
    """Which layers have their rows next to each other in memory, so that one stretch is read for all of them.

    group: what they have in common, by name.
    outputs: how many outputs each of them has, in order.
    number: which of them this is.
    """

    group: str
    outputs: tuple[int, ...]
    number: int


class ByInputLinear(nn.Module):
    """Takes the place of an nn.Linear: x [..., in] -> [..., out].

    weight: [in, out].
    joined: see Joined; None: the weight lies by itself.
    layer: what decoding computes; None until `choose`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        weight_format: WeightFormat | None,
        state: RequestState,
        *,
        native: bool,
        joined: Joined | None = None,
    ) -> None:
        """linear: the layer to replace, whose bias is kept. weight_format: None for floats. state: the model's."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if weight_format is None:
            shape = (self.in_features, self.out_features)
            self.weight = nn.Parameter(linear.weight.new_empty(shape), requires_grad=False)
        else:
            self.weight = QuantizedWeight(self.in_features, self.out_features, weight_format, column_scales=True)
        self.bias, self.state, self.native, self.joined = linear.bias, state, native, joined
        self.layer: ByInput | None = None
        self.reset_counters()

    def reset_counters(self) -> None:
        self.counters = InputCounters()

    @property
    def read_share(self) -> float:
        """Share of the inputs that a decoded token has read on average; 1 if nothing was decoded."""
        counted = self.counters
        return counted.inputs / (counted.tokens * self.in_features) if counted.tokens else 1.0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight."""
        return weight_of(self.weight).nbytes

    def choose(self, choice: InputChoice) -> None:
        """Read these inputs from now on. The weight must be there."""
        weight = weight_of(self.weight)
        same_mean = self.layer is not None and torch.equal(self.layer.mean, choice.mean)
        constant = self.layer.constant if same_mean else product_with_mean(choice.mean, weight, self.bias)
        self.layer = ByInput(weight, choice.mean, choice.norm, constant, choice.threshold)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.state.phase == PREFILL:
            product = (combine if self.native else kernels.combine)(x, weight_of(self.weight))
            return product if self.bias is None else product + self.bias
        y, read = product_of_inputs(x, self.layer, native=self.native)
        self.counters.tokens += x[..., 0].numel()
        self.counters.inputs += read
        return y


def product_with_mean(mean: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """The mean [in] times weight [in, out] plus the bias [out]: float32 [out]."""
    floats = weight if isinstance(weight, QuantizedTensor) else weight.detach()
    product = kernels.weighted_rows(mean.float()[None].to(floats.device), floats)[0].float()
    return product if bias is None else product + bias.detach().float()


def product_of_inputs(x: torch.Tensor, layer: ByInput, *, native: bool) -> tuple[torch.Tensor, int]:
    """Decoded tokens x [..., in] times the inputs that they read, [..., out], and how many these are together."""
    if native and x[..., 0].numel() <= FEW_TOKENS:
        y, read = kernels.by_input(x, layer)
        return y, int(read.sum())
    apart = x.float() - layer.mean.to(x.device)
    if layer.threshold >= 0:
        kept = apart.abs() * layer.norm.to(x.device) > layer.threshold
        apart, read = apart * kept, int(kept.sum())
    else:
        read = apart.numel()
    weight = layer.weight.to(x.device)
    return (kernels.combine(apart.to(x.dtype), weight) + layer.constant.to(x.device)).to(x.dtype), read


def joined(parts: list[ByInputLinear]) -> ByInput:
    """Layers with the same input and choice, one after the other in memory, as one."""
    layers = [part.layer for part in parts]
    weights = [layer.weight for layer in layers]
    first = weights[0]
    if isinstance(first, QuantizedTensor):
        columns = torch.cat([weight.column_scales for weight in weights])
        data, scales = (_side_by_side([getattr(w, name) for w in weights]) for name in ("data", "scales"))
        whole: Weight = replace(first, data=data, scales=scales, column_scales=columns)
    else:
        whole = _side_by_side([weight.detach() for weight in weights])
    return replace(layers[0], weight=whole, constant=torch.cat([layer.constant for layer in layers]))


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    """The matrix [rows, columns of all] whose columns the parts are: a view where they lie next to each other."""
    first, columns = parts[0], sum(part.shape[1] for part in parts)
    place = first.data_ptr()
    for part in parts:
        if part.data_ptr() != place or part.stride() != (columns, 1):
            return torch.cat(parts, dim=1)
        place += part.shape[1] * part.element_size()
    return first.as_strided((first.shape[0], columns), (columns, 1))
