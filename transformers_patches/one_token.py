"""A decoder's pass over one token through a few native operations per layer, in place of transformers' many small ones.

For one sequence, on a CPU, with the native kernels and a cache that has room (kv_cache.py). Anything else, and
everything that somebody watches with a hook, goes through transformers' own forward.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from transformers_patches import kernels
from transformers_patches.families import ffn_spec
from transformers_patches.fast_linear import FastLinear
from transformers_patches.kv_cache import GrowingLayer, growing_cache
from transformers_patches.quantized import QuantizedLinear
from transformers_patches.sparse_ffn import KERNEL_ACTIVATIONS

# Decoder layers of these families are: norm, attention with rotary embeddings, residual, norm, gated FFN, residual.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def speed_up_one_token(model: PreTrainedModel) -> bool:
    """Let a causal language model's decoder take passes over one token natively; False for a family it isn't made for."""
    if model.config.model_type not in FAMILIES:
        return False
    step = OneTokenPass(model.model)
    if not all(layer.usable for layer in step.layers):
        return False
    model.model.forward = step
    return True


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache, of the kind that the model's decoder is fastest with."""
    step = getattr(getattr(model, "model", None), "forward", None)
    return growing_cache() if isinstance(step, OneTokenPass) else DynamicCache()


class OneTokenPass:
    """The forward of a decoder (LlamaModel and its like)."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder, self.original = decoder, decoder.forward
        self.layers = [_Layer(layer, decoder.config) for layer in decoder.layers]
        self.watched = [decoder, *(module for layer in decoder.layers for module in layer.modules())]

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        **options,
    ):
        if inputs_embeds is None and self._fits(input_ids, attention_mask, past_key_values, options):
            return self._pass(input_ids, position_ids, past_key_values)
        return self.original(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **options,
        )

    def _fits(self, ids, mask, cache, options: dict) -> bool:
        return (
            ids is not None
            and ids.numel() == 1
            and isinstance(cache, DynamicCache)
            and len(cache.layers) == len(self.layers)
            and all(type(layer) is GrowingLayer and layer.length for layer in cache.layers)
            and (mask is None or (mask.ndim == 2 and bool(mask.all())))
            and not any(value for name, value in options.items() if name.startswith("output_"))
            and not any(m._forward_hooks or m._forward_pre_hooks for m in self.watched)
        )

    def _pass(self, ids: torch.Tensor, positions: torch.Tensor | None, cache: DynamicCache) -> BaseModelOutputWithPast:
        decoder = self.decoder
        if positions is None:
            positions = torch.tensor([[cache.layers[0].length]])
        x = decoder.embed_tokens(ids)  # [1, 1, H]
        cosine, sine = decoder.rotary_emb(x, positions)  # [1, 1, head size]
        delta = None
        for layer, store in zip(self.layers, cache.layers, strict=True):
            x, normed = layer.attend(x, delta, cosine, sine, store)
            delta = layer.ffn(normed)
        hidden = kernels.add_norm(x, delta, decoder.norm.weight, decoder.norm.variance_epsilon)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


class _Layer:
    """What a decoder layer's operations take, looked up once."""

    def __init__(self, layer: nn.Module, config) -> None:
        self.attention = _attention_of(layer, config)
        self.mlp, self.dense = layer.mlp, None
        if hasattr(layer.mlp, "gate_proj"):
            self.dense = kernels.Projections.of(
                [_weight(getattr(layer.mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")]
            )
            self.activation = KERNEL_ACTIVATIONS.get(ffn_spec(config).activation(config))

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
        if self.dense is None or self.activation is None:
            return self.mlp(x)
        return kernels.dense_ffn(x, self.dense, self.activation)


def _attention_of(layer: nn.Module, config) -> kernels.AttentionLayer | None:
    """None if the kernels don't take one of the projections."""
    attention, norm = layer.self_attn, layer.input_layernorm
    projections = kernels.Projections.of(
        [_weight(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    )
    if projections is None:
        return None
    head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    own = getattr(attention, "sliding_window", None)
    return kernels.AttentionLayer(
        norm.weight,
        layer.post_attention_layernorm.weight,
        projections,
        norm.variance_epsilon,
        attention.scaling,
        *(None if head_norm is None else head_norm.weight for head_norm in head_norms),
        (config.sliding_window if config.model_type == "mistral" else own) or 0,
    )


def _weight(linear: nn.Module):
    """(weight, bias) of a linear layer that the kernels take, or None."""
    if isinstance(linear, QuantizedLinear):
        return linear.weight.packed, linear.bias
    return (linear.weight, linear.bias) if isinstance(linear, FastLinear) else None
