"""What a pass over one token needs of a decoder's layers, and which parts of it the native kernels support."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig

from transformers_patches import kernels
from transformers_patches.families import Family
from transformers_patches.fast_pass.kv_cache import GrowingLayer
from transformers_patches.fast_pass.positions import Rope
from transformers_patches.modules.fast_linear import FastLinear
from transformers_patches.modules.quantized import QuantizedEmbedding, QuantizedLinear, weight_of
from transformers_patches.modules.screened_head import ScreenedHead
from transformers_patches.sparse.by_input_linear import ByInputLinear, joined
from transformers_patches.sparse.neuron_rows import KERNEL_ACTIVATIONS
from transformers_patches.sparse.sparse_ffn import SparseFFN


class LayerParts:
    """What a decoder layer's operations take, looked up once.

    by_input: q, k, v and o if they are stored by input, else nothing.
    attention: what the kernels need for it; None if they don't support one of its projections.
    head_size: D.
    native: whether the native decoder computes the layer's FFN.
    sparse: the layer's SparseFFN, or None.
    module: the layer's FFN as a function.
    dense: the FFN's projections; None if it is sparse or the kernels don't support it.
    activation: the kernels' name of the FFN's activation; None if they don't have it.
    """

    def __init__(self, layer: nn.Module, family: Family, config: PretrainedConfig) -> None:
        self.by_input = _by_input(layer, family)
        self.attention = _attention_of(layer, family, config, self.by_input)
        self.head_size = layer.get_submodule(family.attention).head_dim
        self.native = False
        self.sparse, self.module = _ffn_of(layer, family)
        self.dense, self.activation = None, KERNEL_ACTIVATIONS.get(family.activation(config))
        if self.sparse is None and self.activation is not None:
            holder = layer.get_submodule(family.ffn)
            projections = [getattr(holder, name) for name in (*family.ffn_inputs, family.down)]
            self.dense = kernels.Projections.of([linear_of(projection) for projection in projections])

    @property
    def usable(self) -> bool:
        return self.attention is not None

    def attend(self, x, delta, rope: Rope, store: GrowingLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta + attention, and its norm, both [1, 1, H]; the token's keys and values are stored."""
        result = kernels.attention_step(x, delta, self.attention, rope, store.room_for_one(), store.length)
        store.length += 1
        return result

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) if self.dense is None else kernels.dense_ffn(x, self.dense, self.activation)


def _ffn_of(layer: nn.Module, family: Family) -> tuple[SparseFFN | None, Callable[[torch.Tensor], torch.Tensor]]:
    """A layer's SparseFFN, if it has one, and its FFN as a function."""
    parts = [layer.get_submodule(name) for name in family.ffn_children]
    sparse = parts[0] if isinstance(parts[0], SparseFFN) else None  # then the others do nothing
    return sparse, parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def _by_input(layer: nn.Module, family: Family) -> list[ByInputLinear]:
    attention = layer.get_submodule(family.attention)
    parts = [getattr(attention, name) for name in (*family.attention_inputs, family.attention_output)]
    return parts if all(isinstance(part, ByInputLinear) for part in parts) else []


def _attention_of(
    layer: nn.Module, family: Family, config: PretrainedConfig, by_input: list[ByInputLinear]
) -> kernels.AttentionLayer | None:
    """None if the kernels don't support one of the projections."""
    attention, norm, next_norm = map(layer.get_submodule, (family.attention, family.attention_norm, family.ffn_norm))
    names = (*family.attention_inputs, family.attention_output)
    projections = kernels.Projections.of([linear_of(getattr(attention, name)) for name in names])
    inputs = (joined(by_input[:-1]), by_input[-1].layer) if by_input else None
    if projections is None and inputs is None:
        return None
    head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    weight, bias, eps = norm_of(norm)
    next_weight, next_bias, _ = norm_of(next_norm)
    return kernels.AttentionLayer(
        weight,
        next_weight,
        projections,
        eps,
        attention.scaling,
        *(None if head_norm is None else head_norm.weight for head_norm in head_norms),
        family.sliding_window(attention, config),
        bias,
        next_bias,
        inputs,
        by_input[1].out_features // attention.head_dim if by_input else 0,
    )


def norm_of(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Weight, bias and eps of an RMSNorm, whose bias is None, or of a LayerNorm."""
    if isinstance(norm, nn.LayerNorm):
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        return norm.weight.detach(), bias.detach(), norm.eps
    return norm.weight.detach(), None, norm.variance_epsilon


def linear_of(linear: nn.Module):
    """(weight, bias) of a linear layer that the kernels support, or None."""
    known = isinstance(linear, (FastLinear, QuantizedLinear, ScreenedHead))
    return (weight_of(linear.weight), linear.bias) if known else None


def rows_of(embedding: nn.Module):
    """(weight, None) of embeddings that a plain lookup gives, or None."""
    if isinstance(embedding, QuantizedEmbedding):
        return (embedding.weight.packed, None) if embedding.scale is None else None
    return (embedding.weight, None) if type(embedding) is nn.Embedding and embedding.max_norm is None else None
