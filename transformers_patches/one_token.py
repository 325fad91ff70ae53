"""A decoder's pass over one token through one native call for many layers, in place of transformers' many small operations.

For one sequence, on a CPU, with the native kernels and a cache that has room (kv_cache.py). Anything else, and
everything that somebody watches with a hook, goes through transformers' own forward.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from transformers_patches import kernels
from transformers_patches.families import ffn_spec
from transformers_patches.fast_linear import FastLinear
from transformers_patches.kv_cache import GrowingCache, GrowingLayer
from transformers_patches.phase import DECODE
from transformers_patches.quantized import QuantizedEmbedding, QuantizedLinear, weight_of
from transformers_patches.screened_head import ScreenedHead
from transformers_patches.sparse_ffn import KERNEL_ACTIVATIONS, SparseFFN

# Decoder layers of these families are: norm, attention with rotary embeddings, residual, norm, gated FFN, residual.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def speed_up_one_token(model: PreTrainedModel) -> bool:
    """Let a causal language model's decoder take passes over one token natively; False for a family it isn't made for."""
    if model.config.model_type not in FAMILIES:
        return False
    step = OneTokenPass(model.model, model.lm_head)
    if not all(layer.usable for layer in step.layers):
        return False
    model.model.forward = step
    return True


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache, of the kind that the model's decoder is fastest with."""
    step = getattr(getattr(model, "model", None), "forward", None)
    return GrowingCache() if isinstance(step, OneTokenPass) else DynamicCache()


class OneTokenPass:
    """The forward of a decoder (LlamaModel and its like), and with its head that of the whole model.

    Layers that follow each other and that the native decoder knows how to compute are one call; the others are an
    operation for attention and their own FFN module.
    """

    def __init__(self, decoder: nn.Module, head: nn.Module) -> None:
        self.decoder, self.head, self.original = decoder, head, decoder.forward
        self.layers = [_Layer(layer, decoder.config) for layer in decoder.layers]
        modules = [
            decoder,
            decoder.embed_tokens,
            head,
            *(module for layer in decoder.layers for module in layer.modules()),
        ]
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.unwatched_until = -1  # the number of the next hook in PyTorch when there was none here
        self.rotary = RotaryTable(decoder.rotary_emb)
        self.native: kernels.Decoder | None = None
        self.has_ends = False  # whether `native` knows embeddings and head
        self.runs: list[range] = []  # of layers in one call; in between, layers of one
        self.choices: list[object] = [None] * len(self.layers)  # those of the sparse layers that `native` knows

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
            hidden = self.advance(input_ids, past_key_values, position_ids)
            return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)
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
            and (mask is None or (mask.ndim == 2 and bool(mask.all())))
            and not any(value for name, value in options.items() if name.startswith("output_"))
            and self.ready(cache)
        )

    def ready(self, cache) -> bool:
        """Whether `advance` can take a token that follows those of the cache."""
        return (
            isinstance(cache, GrowingCache)
            and len(cache.layers) == len(self.layers)
            and all(type(layer) is GrowingLayer and layer.length for layer in cache.layers)
            and not self._watched()
        )

    def _watched(self) -> bool:
        """Whether a module has a hook; looked up again only after one has been registered somewhere."""
        if self.unwatched_until != RemovableHandle.next_id:
            if any(self.hooks):
                return True
            self.unwatched_until = RemovableHandle.next_id
        return False

    def advance(self, ids: torch.Tensor, cache: GrowingCache, positions: torch.Tensor | None = None) -> torch.Tensor:
        """One token, ids [1, 1], after those of the cache, which it joins; the decoder's output [1, 1, H]."""
        decoder = self.decoder
        position = cache.layers[0].length if positions is None else int(positions)
        x = decoder.embed_tokens(ids)  # [1, 1, H]
        turns = self.rotary.at(x, position)
        self._follow_choices(x)
        delta = None
        for run in self.runs:
            if self.layers[run.start].native:
                x, delta = self._run(run, x, delta, turns, cache)
            else:
                layer = self.layers[run.start]
                x, normed = layer.attend(x, delta, *turns, cache.layers[run.start])
                delta = layer.ffn(normed)
        if not self.layers[-1].native:
            delta = kernels.add_norm(x, delta, decoder.norm.weight, decoder.norm.variance_epsilon)
        return delta

    def _run(self, run: range, x, delta, turns, cache: GrowingCache) -> tuple[torch.Tensor, torch.Tensor]:
        stores = cache.layers[run.start : run.stop]
        room = cache.room_for_one(run)
        x, delta, computed = self.native.run(run, x, delta, *turns, room.keys, room.values, stores[0].length)
        self._count(run, stores, computed)
        return x, delta

    def logits(self, ids: torch.Tensor, cache: GrowingCache, needed: kernels.Needed = kernels.SOFTMAX) -> torch.Tensor:
        """As the model's forward over one token, ids [1, 1], after those of the cache, which it joins: [1, 1, V].

        needed: which logits have to be right, where the head can tell them apart.
        """
        like = self.decoder.norm.weight[None, None]
        self._follow_choices(like)
        if not self.has_ends or len(self.runs) > 1 or not self.layers[0].native:
            return self.head(self.advance(ids, cache))
        run, length = self.runs[0], cache.layers[0].length
        room = cache.room_for_one(run)
        turns = self.rotary.at(like, length)
        logits, computed, exact = self.native.logits(int(ids), *turns, room.keys, room.values, length, needed)
        self._count(run, cache.layers, computed)
        if isinstance(self.head, ScreenedHead):
            self.head.count(1, exact)
        return logits

    def _count(self, run: range, stores: list[GrowingLayer], computed: torch.Tensor) -> None:
        """What a native call did: a token more in the cache, so many neurons in each layer."""
        for store in stores:
            store.length += 1
        for number, neurons in zip(run, computed.tolist(), strict=True):
            ffn = self.layers[number].sparse
            if ffn is not None:  # without a low-rank map, which the native decoder does not know
                ffn.counters.add(1, neurons, ffn.selection.rows_read(neurons))

    def _follow_choices(self, x: torch.Tensor) -> None:
        """Tell the native decoder what sparse layers compute from now on, where that has changed."""
        if self.native is None:
            self.native = self._new_native()
        changed = not self.runs
        for number, layer in enumerate(self.layers):
            ffn = layer.sparse
            if ffn is None or ffn.choice is self.choices[number]:
                continue
            active = ffn.active_neurons(x) if ffn.state.phase == DECODE else None
            if active is not None:
                self.native.set_active(number, active)
            # a pass that belongs to the prompt leaves evidence: the layer's own module runs it, and it is asked again
            self.choices[number] = None if ffn.state.phase != DECODE else ffn.choice
            changed |= layer.native != (active is not None)
            layer.native = active is not None
        if changed:
            self.runs = _runs([layer.native for layer in self.layers])

    def _new_native(self) -> kernels.Decoder:
        native = kernels.Decoder()
        for number, layer in enumerate(self.layers):
            native.add_layer(layer.attention, layer.head_size)
            if layer.dense is not None and layer.activation is not None:
                native.set_whole(number, layer.dense, layer.activation)
                layer.native = True
        native.set_norm(self.decoder.norm.weight.detach(), self.decoder.norm.variance_epsilon)
        embedding, head = (
            kernels.Projections.of([weight]) for weight in (_rows(self.decoder.embed_tokens), _weight(self.head))
        )
        self.has_ends = embedding is not None and head is not None
        if self.has_ends:
            native.set_ends(embedding, head, self.head.screen if isinstance(self.head, ScreenedHead) else None)
        return native


def _runs(native: list[bool]) -> list[range]:
    """Native layers that follow each other together, others alone."""
    runs: list[range] = []
    for number, ours in enumerate(native):
        if ours and runs and native[number - 1]:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


class RotaryTable:
    """The rotary embedding's cosines and sines, kept for blocks of positions where they don't depend on the length."""

    STATIC = ("default", "linear", "llama3", "yarn")
    BLOCK = 256

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        self.static = getattr(rotary, "rope_type", None) in self.STATIC
        self.blocks: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def at(self, x: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, 1, D] each, of x's type."""
        if not self.static:
            return self.rotary(x, torch.tensor([[position]]))
        number, place = divmod(position, self.BLOCK)
        if (number, x.dtype) not in self.blocks:
            start = number * self.BLOCK
            self.blocks[number, x.dtype] = self.rotary(x, torch.arange(start, start + self.BLOCK)[None])
        return tuple(part[:, place : place + 1] for part in self.blocks[number, x.dtype])


class _Layer:
    """What a decoder layer's operations take, looked up once."""

    def __init__(self, layer: nn.Module, config) -> None:
        self.attention = _attention_of(layer, config)
        self.head_size = layer.self_attn.head_dim
        self.mlp, self.dense = layer.mlp, None
        self.sparse = layer.mlp if isinstance(layer.mlp, SparseFFN) else None
        self.native = False  # whether the native decoder knows the layer's FFN
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
    known = isinstance(linear, (FastLinear, QuantizedLinear, ScreenedHead))
    return (weight_of(linear.weight), linear.bias) if known else None


def _rows(embedding: nn.Module):
    """(weight, no bias) of embeddings that are looked up as they are, or None."""
    if isinstance(embedding, QuantizedEmbedding):
        return (embedding.weight.packed, None) if embedding.scale is None else None
    return (embedding.weight, None) if type(embedding) is nn.Embedding and embedding.max_norm is None else None
