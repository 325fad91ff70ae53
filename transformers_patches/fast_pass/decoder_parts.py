"""Where the decoders of the families keep what a pass over one token takes, and what of it the native kernels know.

Another family whose layers are norm, attention, residual, norm, FFN, residual is one more entry in DECODERS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from transformers_patches import kernels
from transformers_patches.families import FFNSpec, ffn_spec
from transformers_patches.fast_pass.kv_cache import GrowingLayer
from transformers_patches.modules.fast_linear import FastLinear
from transformers_patches.modules.quantized import QuantizedEmbedding, QuantizedLinear, weight_of
from transformers_patches.modules.screened_head import ScreenedHead
from transformers_patches.sparse.sparse_ffn import KERNEL_ACTIVATIONS, SparseFFN


@dataclass(frozen=True)
class DecoderSpec:
    """A family's decoder.

    decoder: path of the module that has embeddings and layers; attention_norm, ffn_norm: of a layer, before its attention and
    before its FFN; output: the attention's output projection; last_norm: the norm after the last layer; learned_positions:
    embeddings of places that are added to those of tokens, None where queries and keys are rotated.
    """

    decoder: str = "model"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    output: str = "o_proj"
    last_norm: str = "norm"
    learned_positions: str | None = None

    def norms(self, model: PreTrainedModel) -> list[nn.Module | None]:
        """All of them; one may be missing in a model of another make."""
        decoder = model.get_submodule(self.decoder)
        layers = [getattr(layer, name) for layer in decoder.layers for name in (self.attention_norm, self.ffn_norm)]
        return [*layers, getattr(decoder, self.last_norm)]

    def knows(self, model: PreTrainedModel) -> bool:
        """Whether a model is built as the family usually is: OPT-350m has its norms elsewhere and projects its embeddings,
        others have norms without weights."""
        decoder = model.get_submodule(self.decoder)
        norms_before = getattr(model.config, "do_layer_norm_before", True)
        projects = getattr(decoder, "project_in", None) is not None
        return norms_before and not projects and all(n is not None and n.weight is not None for n in self.norms(model))


_ROTARY = DecoderSpec()

DECODERS: dict[str, DecoderSpec] = {
    "llama": _ROTARY,
    "mistral": _ROTARY,
    "qwen2": _ROTARY,
    "qwen3": _ROTARY,
    "opt": DecoderSpec(
        decoder="model.decoder",
        attention_norm="self_attn_layer_norm",
        ffn_norm="final_layer_norm",
        output="out_proj",
        last_norm="final_layer_norm",
        learned_positions="embed_positions",
    ),
}


class LayerParts:
    """What a decoder layer's operations take, looked up once."""

    def __init__(self, layer: nn.Module, spec: DecoderSpec, config: PretrainedConfig) -> None:
        self.attention = _attention_of(layer, spec, config)
        self.head_size = layer.self_attn.head_dim
        self.native = False  # whether the native decoder knows the layer's FFN
        ffn = ffn_spec(config)
        self.sparse, self.module = _ffn_of(layer, ffn)
        self.dense, self.activation = None, KERNEL_ACTIVATIONS.get(ffn.activation(config))
        if self.sparse is None and self.activation is not None:
            places = [name for name in (ffn.gate, ffn.up, ffn.down) if name]
            holder = layer.get_submodule(ffn.ffn)
            self.dense = kernels.Projections.of([linear_of(getattr(holder, name)) for name in places])

    @property
    def usable(self) -> bool:
        return self.attention is not None

    def attend(self, x, delta, cosine, sine, store: GrowingLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta + attention, and its norm, both [1, 1, H]; the token's keys and values are stored."""
        keys, values = store.room_for_one()
        result = kernels.attention_step(x, delta, self.attention, cosine, sine, keys, values, store.length)
        store.length += 1
        return result

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) if self.dense is None else kernels.dense_ffn(x, self.dense, self.activation)


def _ffn_of(layer: nn.Module, spec: FFNSpec) -> tuple[SparseFFN | None, Callable[[torch.Tensor], torch.Tensor]]:
    """A layer's SparseFFN, if it has one, and its FFN as a function."""
    if spec.ffn:
        module = layer.get_submodule(spec.ffn)
        return (module if isinstance(module, SparseFFN) else None), module
    # its parts are the layer's own; of a SparseFFN, which is the first of them, the others do nothing
    parts = [getattr(layer, name) for name in (spec.up, spec.activation_module, spec.down)]
    return (parts[0] if isinstance(parts[0], SparseFFN) else None), nn.Sequential(*parts)


def _attention_of(layer: nn.Module, spec: DecoderSpec, config: PretrainedConfig) -> kernels.AttentionLayer | None:
    """None if the kernels don't take one of the projections."""
    attention, norm, next_norm = layer.self_attn, getattr(layer, spec.attention_norm), getattr(layer, spec.ffn_norm)
    names = ("q_proj", "k_proj", "v_proj", spec.output)
    projections = kernels.Projections.of([linear_of(getattr(attention, name)) for name in names])
    if projections is None:
        return None
    head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    own = getattr(attention, "sliding_window", None)
    weight, bias, eps = norm_of(norm)
    next_weight, next_bias, _ = norm_of(next_norm)
    return kernels.AttentionLayer(
        weight,
        next_weight,
        projections,
        eps,
        attention.scaling,
        *(None if head_norm is None else head_norm.weight for head_norm in head_norms),
        (config.sliding_window if config.model_type == "mistral" else own) or 0,
        bias,
        next_bias,
    )


def norm_of(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Weight, bias and eps of an RMSNorm, whose bias is None, or of a LayerNorm."""
    if isinstance(norm, nn.LayerNorm):
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        return norm.weight.detach(), bias.detach(), norm.eps
    return norm.weight.detach(), None, norm.variance_epsilon


def linear_of(linear: nn.Module):
    """(weight, bias) of a linear layer that the kernels take, or None."""
    known = isinstance(linear, (FastLinear, QuantizedLinear, ScreenedHead))
    return (weight_of(linear.weight), linear.bias) if known else None


def rows_of(embedding: nn.Module):
    """(weight, no bias) of embeddings that are looked up as they are, or None."""
    if isinstance(embedding, QuantizedEmbedding):
        return (embedding.weight.packed, None) if embedding.scale is None else None
    return (embedding.weight, None) if type(embedding) is nn.Embedding and embedding.max_norm is None else None
