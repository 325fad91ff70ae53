"""The operations of a decoder layer on one token that are more than a matrix product: what they take, in PyTorch too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transformers_patches.kernels import reference
from transformers_patches.kernels.formats import WeightFormat
from transformers_patches.kernels.quantization import QuantizedTensor

Linear = tuple[Tensor | QuantizedTensor, Tensor | None]  # weight [out, in] and bias


@dataclass(frozen=True)
class Projections:
    """Linear layers of one kind of weights, as the operations take them.

    weights: floats [out, in], or the data of quantised weights.
    scales: of each quantised weight; empty for floats.
    biases: [out] each, or None.
    format: of the quantised weights; None for floats.
    column_scales: those of the last one, down rows that are summed up.
    """

    weights: list[Tensor]
    scales: list[Tensor]
    biases: list[Tensor | None]
    format: WeightFormat | None
    column_scales: Tensor | None = None

    @classmethod
    def of(cls, linears: Sequence[Linear | None]) -> Projections | None:
        """None if one is missing, or where kinds are mixed."""
        if any(linear is None for linear in linears):
            return None
        weights, biases = [weight for weight, _ in linears], [bias for _, bias in linears]
        kinds = {weight.format if isinstance(weight, QuantizedTensor) else weight.dtype for weight in weights}
        if len(kinds) != 1:
            return None
        if isinstance(weights[0], QuantizedTensor):
            columns = weights[-1].column_scales
            return cls([w.data for w in weights], [w.scales for w in weights], biases, weights[0].format, columns)
        return cls([weight.detach() for weight in weights], [], biases, None)

    @property
    def are_native(self) -> bool:
        """Whether the native operations know the format."""
        return self.format is None or self.format.native is not None

    @property
    def bits(self) -> int:
        """What native operations call the format, 0 for floats."""
        return 0 if self.format is None else self.format.native.code

    def linear(self, number: int, x: Tensor) -> Tensor:
        """One of them in PyTorch."""
        weight = self.weights[number]
        if self.format is not None:
            weight = QuantizedTensor(weight, self.scales[number], self.format)
        return reference.linear(x, weight, self.biases[number])


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of a decoder layer, with the norms around it: what is the same for every token.

    norm, next_norm [H], q_norm, k_norm [D] or None: weights of RMSNorms with eps; norm_bias, next_norm_bias [H]: with these the
    first two are LayerNorms; projections: q, k, v and o; scale: of the scores; window: how many positions are seen, 0 for all.
    """

    norm: Tensor
    next_norm: Tensor
    projections: Projections
    eps: float
    scale: float
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int = 0
    norm_bias: Tensor | None = None
    next_norm_bias: Tensor | None = None

    @property
    def norm_arguments(self) -> tuple[list[Tensor], list[Tensor], float]:
        """Norms, their biases and eps, as the operations take them; ValueError for kinds that are mixed."""
        norms = [norm for norm in (self.norm, self.next_norm, self.q_norm, self.k_norm) if norm is not None]
        biases = [bias for bias in (self.norm_bias, self.next_norm_bias) if bias is not None]
        if len(biases) not in (0, len(norms)):
            raise ValueError("a layer's norms must all be RMSNorms or all be LayerNorms")
        return norms, biases, self.eps


def attention_step(
    x: Tensor,
    delta: Tensor | None,
    layer: AttentionLayer,
    cosine: Tensor | None,
    sine: Tensor | None,
    keys: Tensor,
    values: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """See transformers_patches.kernels.attention_step."""
    x = x if delta is None else x + delta
    inputs, projections, eps = norm(x, layer.norm, layer.norm_bias, layer.eps), layer.projections, layer.eps
    q, k, v = (projections.linear(number, inputs).view(-1, keys.shape[-1]) for number in range(3))  # [heads, D]
    if layer.q_norm is not None:
        q, k = norm(q, layer.q_norm, None, eps), norm(k, layer.k_norm, None, eps)
    if cosine is not None:
        q, k = _rotated(q, cosine, sine), _rotated(k, cosine, sine)
    keys[0, :, length] = k
    values[0, :, length] = v
    first = max(0, length + 1 - layer.window) if layer.window else 0
    attended = F.scaled_dot_product_attention(
        q[None, :, None],
        keys[:, :, first : length + 1],
        values[:, :, first : length + 1],
        scale=layer.scale,
        enable_gqa=True,
    )
    x = x + projections.linear(3, attended.reshape(*x.shape[:-1], -1))
    return x, norm(x, layer.next_norm, layer.next_norm_bias, eps)


def dense_ffn(x: Tensor, projections: Projections, activation: str) -> Tensor:
    """See transformers_patches.kernels.dense_ffn."""
    h = reference.ACTIVATIONS[activation](projections.linear(0, x))
    if len(projections.weights) == 2:
        return projections.linear(1, h)
    return projections.linear(2, h * projections.linear(1, x))


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32 (Zhang and Sennrich 2019); with a bias LayerNorm."""
    if bias is not None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding with halves as pairs: heads [n, D], cosine and sine [..., D] of one position."""
    half = heads.shape[-1] // 2
    turned = torch.cat([-heads[:, half:], heads[:, :half]], dim=-1)
    return heads * cosine.view(-1) + turned * sine.view(-1)
