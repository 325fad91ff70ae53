"""Modules that hold quantised weights: what `--dtype int8` and the like put in place of nn.Linear and nn.Embedding."""

from __future__ import annotations

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import QuantizedTensor, WeightFormat
from transformers_patches.modules.fast_linear import multiply


class QuantizedWeight(nn.Module):
    """A [rows, columns] quantised weight, where an nn.Parameter would be: buffers `data`, `scales` and `column_scales`.

    `packed` is the same as the kernels take it. Moves with its module, but keeps its types.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        weight_format: WeightFormat,
        *,
        in_planes: bool = False,
        column_scales: bool = False,
    ) -> None:
        super().__init__()
        self.fill(
            QuantizedTensor.empty(
                rows, columns, weight_format, "meta", in_planes=in_planes, column_scales=column_scales
            )
        )

    def fill(self, packed: QuantizedTensor) -> None:
        """Hold this weight from now on."""
        self.packed = packed
        self.register_buffer("data", packed.data)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("column_scales", packed.column_scales)

    def _apply(self, fn, recurse: bool = True) -> QuantizedWeight:
        # .to(dtype), .float() and the like are meant for float tensors: only the device matters here
        device = fn(torch.empty(0, device=self.packed.device)).device
        if device != self.packed.device and self.packed.device.type != "meta":
            self.fill(self.packed.to(device))
        return self

    @property
    def shape(self) -> torch.Size:
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.packed.nbytes

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.packed.format.name}"


def weight_of(held: torch.Tensor | QuantizedWeight) -> torch.Tensor | QuantizedTensor:
    """What the kernels take of a parameter or quantised weight."""
    return held.packed if isinstance(held, QuantizedWeight) else held


class QuantizedLinear(nn.Module):
    """x [..., in] -> [..., out], like the nn.Linear that it replaces.

    native: few tokens go through the kernels, native or Triton's.
    """

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None, *, native: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.native = weight, bias, native
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = multiply if self.native else kernels.project
        return product(x, self.weight.packed, self.bias)


class QuantizedEmbedding(nn.Module):
    """Token ids [...] -> [..., H], like the nn.Embedding that it replaces.

    scale: what Gemma multiplies embeddings by; None: nothing.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, scale: float | None) -> None:
        super().__init__()
        self.weight, self.scale = weight, scale
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("_float", torch.empty(0, dtype=dtype), persistent=False)  # the type that comes out

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = kernels.dequantize(self.weight.packed[ids.flatten()], self._float.dtype)
        if self.scale is not None:
            rows = rows * torch.tensor(self.scale, dtype=rows.dtype)
        return rows.view(*ids.shape, self.embedding_dim)


def quantize_modules(
    model: nn.Module,
    weight_format: WeightFormat,
    head_format: WeightFormat,
    dtype: torch.dtype,
    *,
    native: bool,
    head_in_planes: bool = False,
) -> None:
    """Put quantised modules, still without memory, in place of a meta model's nn.Linears, embeddings and head.

    weight_format: of the linear layers.
    head_format: of embeddings and head, which stay tied if they are.
    head_in_planes: whether the head is in planes, as screening needs it.

    Weights whose columns don't make up whole groups stay floats; PartInferError if that is so for the hidden size.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for needed in (weight_format, head_format):
        if model.config.hidden_size % needed.group:
            raise PartInferError(
                f"--dtype {needed.name} needs a hidden size that is a multiple of {needed.group}, this model has "
                f"{model.config.hidden_size}: use --dtype bfloat16"
            )
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.in_features % weight_format.group == 0 and module is not head:
            weight = QuantizedWeight(*module.weight.shape, weight_format)
            model.set_submodule(name, QuantizedLinear(weight, module.bias, native=native))
    tied = model.config.tie_word_embeddings
    packed = QuantizedWeight(*embedding.weight.shape, head_format, in_planes=head_in_planes and tied)
    scale = getattr(embedding, "scalar_embed_scale", None)
    model.set_input_embeddings(QuantizedEmbedding(packed, dtype, scale))
    weight = packed if tied else QuantizedWeight(*head.weight.shape, head_format, in_planes=head_in_planes)
    model.set_output_embeddings(QuantizedLinear(weight, head.bias, native=native))


def weight_places(model: nn.Module) -> list[tuple[str, nn.Parameter | QuantizedWeight]]:
    """All places of a model that hold weights, by name; tied ones by each of their names."""
    places = list(model.named_parameters(remove_duplicate=False))
    modules = model.named_modules(remove_duplicate=False)
    return places + [(name, module) for name, module in modules if isinstance(module, QuantizedWeight)]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, quantised ones with their scales, tied ones once."""
    packed = sum(module.nbytes for module in model.modules() if isinstance(module, QuantizedWeight))
    return packed + sum(parameter.nbytes for parameter in model.parameters())
