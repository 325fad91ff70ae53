"""A decoder's pass over one token: one native call for many layers instead of transformers' many small operations.

For one sequence, on a CPU, with the native kernels and a cache that has room (kv_cache.py). Anything else, and any
model with hooks, goes through transformers' own forward.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from transformers_patches import kernels
from transformers_patches.families import Family, family_of
from transformers_patches.fast_pass.decoder_parts import LayerParts, linear_of, norm_of, rows_of
from transformers_patches.fast_pass.hooks import HookWatch
from transformers_patches.fast_pass.kv_cache import GrowingCache, GrowingLayer
from transformers_patches.fast_pass.positions import LearnedPositions, Rope, RotaryTable
from transformers_patches.fast_pass.recorded_pass import recorded_pass
from transformers_patches.modules.screened_head import ScreenedHead
from transformers_patches.sparse.request import DECODE


def speed_up_one_token(model: PreTrainedModel) -> bool:
    """Make a causal language model's decoder run one-token passes natively. False if its family isn't supported."""
    family = family_of(model.config)
    if not family.fits_native_decoder(model):
        return False
    step = OneTokenPass(model, family)
    if not all(layer.usable for layer in step.layers):
        return False
    step.decoder.forward = step
    return True


def one_token_pass(model: PreTrainedModel) -> OneTokenPass | None:
    """The pass that `speed_up_one_token` has given the model, or None."""
    step = model.get_submodule(family_of(model.config).decoder).forward
    return step if isinstance(step, OneTokenPass) else None


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of the kind that suits the model's decoder best."""
    if one_token_pass(model) is not None or recorded_pass(model) is not None:
        return GrowingCache()
    known = family_of(model.config).found is None
    return DynamicCache() if known else DynamicCache(config=model.config)  # its layers may need caches of other kinds


class OneTokenPass:
    """The forward of a decoder (LlamaModel and the like) and, together with the lm_head, of the whole model.

    Consecutive layers that the native decoder can compute are one call. For each of the others there is one operation
    for the attention, followed by the layer's own FFN module.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        decoder, self.family = model.get_submodule(family.decoder), family
        self.decoder, self.head, self.original = decoder, model.lm_head, decoder.forward
        self.layers = [LayerParts(layer, family, decoder.config) for layer in decoder.layers]
        self.norm = norm_of(getattr(decoder, family.last_norm))
        hooked = [*decoder.modules(), self.head]
        self.watch = HookWatch(hooked)
        learned = family.learned_positions and getattr(decoder, family.learned_positions)
        self.positions = RotaryTable(decoder.rotary_emb) if learned is None else LearnedPositions(learned)
        self.native: kernels.Decoder | None = None
        self.has_head = False  # whether `native` knows embeddings and lm_head
        self.runs: list[range] = []  # layers that are one native call, and single layers in between
        self.choices: list[object] = [None] * len(self.layers)  # what `native` has been told of each sparse layer

    def renew(self) -> None:
        """Look the layers up again: what decoding reads of them has changed."""
        self.layers = [LayerParts(layer, self.family, self.decoder.config) for layer in self.decoder.layers]
        self.native, self.runs, self.choices = None, [], [None] * len(self.layers)

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
            and not self.watch.any()
        )

    def finish(self) -> None:
        """Nothing: what is computed is counted at once."""

    def advance(self, ids: torch.Tensor, cache: GrowingCache, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Take one token, ids [1, 1], and append it to the cache. Returns the decoder's output [1, 1, H]."""
        position = cache.layers[0].length if positions is None else int(positions)
        x = self.decoder.embed_tokens(ids)  # [1, 1, H]
        learned = self.positions.embedding(position)
        x = x if learned is None else x + learned
        rope = self.positions.rope(x, position)
        self._follow_choices(x)
        delta = None
        for run in self.runs:
            if self.layers[run.start].native:
                x, delta = self._run(run, x, delta, rope, cache)
            else:
                layer = self.layers[run.start]
                x, normed = layer.attend(x, delta, rope, cache.layers[run.start])
                delta = layer.ffn(normed)
        if not self.layers[-1].native:
            delta = kernels.add_norm(x, delta, *self.norm)
        return delta

    def _run(self, run: range, x, delta, rope: Rope, cache: GrowingCache) -> tuple[torch.Tensor, torch.Tensor]:
        stores = cache.layers[run.start : run.stop]
        room = cache.room_for_one(run)
        x, delta, computed = self.native.run(run, x, delta, rope, (room.keys, room.values), stores[0].length)
        self._count(run, stores, computed)
        return x, delta

    def logits(self, ids: torch.Tensor, cache: GrowingCache, needed: kernels.Needed = kernels.SOFTMAX) -> torch.Tensor:
        """As the model's forward over one token, ids [1, 1], which is appended to the cache: logits [1, 1, V].

        needed: which logits must be exact, if the lm_head is screened.
        """
        like = self.norm[0][None, None]
        self._follow_choices(like)
        if not self.has_head or len(self.runs) > 1 or not self.layers[0].native:
            return self.head(self.advance(ids, cache))
        run, length = self.runs[0], cache.layers[0].length
        room = cache.room_for_one(run)
        learned, rope = self.positions.embedding(length), self.positions.rope(like, length)
        caches = (room.keys, room.values)
        logits, computed, exact = self.native.logits(int(ids), learned, rope, caches, length, needed)
        self._count(run, cache.layers, computed)
        if isinstance(self.head, ScreenedHead):
            self.head.count(1, exact)
        return logits

    def _count(self, run: range, stores: list[GrowingLayer], computed: torch.Tensor) -> None:
        """Record what a native call did: one more token in the cache, and how many neurons each layer computed."""
        for store in stores:
            store.length += 1
        if self.layers[run.start].by_input:
            self._count_inputs(run)
            return
        for number, neurons in zip(run, computed.tolist(), strict=True):
            ffn = self.layers[number].sparse
            if ffn is not None:
                ffn.counters.add(1, neurons, ffn.selection.rows_read(neurons))

    def _count_inputs(self, run: range) -> None:
        """The same for layers that are stored by input."""
        counts = self.native.take_counts().tolist()
        for number in run:
            layer = self.layers[number]
            attention, output, inputs, neurons, down = counts[number]
            layer.sparse.counters.add(1, neurons, layer.sparse.selection.rows_of(inputs, neurons, down))
            for part, read in zip(layer.by_input, (attention, attention, attention, output), strict=True):
                part.counters.tokens += 1
                part.counters.inputs += read

    def _follow_choices(self, x: torch.Tensor) -> None:
        """Tell the native decoder which neurons the sparse layers compute from now on, where that has changed."""
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
            # a pass over the prompt leaves evidence: the layer's own module runs it, and the next pass asks again
            self.choices[number] = None if ffn.state.phase != DECODE else ffn.choice
            changed |= layer.native != (active is not None)
            layer.native = active is not None
        if changed:
            self.runs = _runs([layer.native for layer in self.layers])

    def _new_native(self) -> kernels.Decoder:
        native = kernels.Decoder()
        for number, layer in enumerate(self.layers):
            native.add_layer(layer.attention, layer.head_size)
            if layer.dense is not None:
                native.set_dense(number, layer.dense, layer.activation)
                layer.native = True
        native.set_norm(*self.norm)
        embedding = kernels.Projections.of([rows_of(self.decoder.embed_tokens)])
        head = kernels.Projections.of([linear_of(self.head)])
        self.has_head = embedding is not None and head is not None
        if self.has_head:
            screen = self.head.screen if isinstance(self.head, ScreenedHead) else None
            native.set_embedding_and_head(embedding, head, screen)
        return native


def _runs(native: list[bool]) -> list[range]:
    """Consecutive native layers as one range; every other layer as a range of its own."""
    runs: list[range] = []
    for number, ours in enumerate(native):
        if ours and runs and native[number - 1]:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs
