"""The decoder layers of a model in one native object, which takes a token through a run of them in a single call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transformers_patches.kernels.layer import AttentionLayer, Projections
from transformers_patches.kernels.screening import SOFTMAX, Needed, Screen


@dataclass(frozen=True)
class ActiveNeurons:
    """An FFN as one token computes it: what `sparse_ffn` takes, and with `size` what `sparse_ffn_by_up` takes.

    projections: gate, up and down [L, H], neuron-major, or of a plain FFN fc1 and fc2; prefix, index: the active neurons, or the candidates; size
    float32 [L], keep_count, threshold: how a token chooses among candidates; added: [H] each, onto the output.
    """

    projections: Projections
    activation: str
    prefix: int
    index: Tensor | None = None
    size: Tensor | None = None
    keep_count: int | None = None
    threshold: float = 0.0
    added: Sequence[Tensor] = field(default_factory=tuple)


class Decoder:
    """Layers are added once; what their FFNs compute can be set again and again, for every prompt.

    Only where the native kernels are. Raises ValueError for what doesn't fit.
    """

    def __init__(self) -> None:
        self._native = torch.classes.partinfer.Decoder()

    def add_layer(self, layer: AttentionLayer, head_size: int) -> None:
        """The attention of the next layer; its FFN has still to be set."""
        p = layer.projections
        weights = (p.weights, p.scales, p.biases, p.bits)
        self._native.add_layer(*layer.norm_arguments, *weights, layer.window, layer.scale, head_size)

    def set_whole(self, number: int, projections: Projections, activation: str) -> None:
        """The FFN of layer `number` is computed whole; projections: gate, up and down, or fc1 and fc2, as nn.Linear has
        them."""
        p = projections
        self._native.set_whole(number, p.weights, p.scales, p.biases, p.bits, activation)

    def set_active(self, number: int, ffn: ActiveNeurons) -> None:
        """The FFN of layer `number` is computed for some neurons."""
        p, keep = ffn.projections, -1 if ffn.keep_count is None else ffn.keep_count
        self._native.set_rows(
            number, p.weights, p.scales, p.column_scales, p.biases, p.bits, ffn.activation, ffn.prefix, ffn.index, ffn.size,
            keep, ffn.threshold, list(ffn.added),
        )  # fmt: skip

    def set_norm(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        """The RMSNorm, or with a bias LayerNorm, after the last layer, [H]; all layers have been added."""
        self._native.set_norm(weight, bias, eps)

    def set_ends(self, embedding: Projections, head: Projections, screen: Screen | None = None) -> None:
        """The embeddings [V, H], as of a linear layer, and the head [V, H]: for `logits`. The norm has been set.

        screen: what the head is screened with, if it is.
        """
        self._native.set_ends(
            embedding.weights,
            embedding.scales,
            embedding.bits,
            head.weights,
            head.scales,
            head.biases,
            head.bits,
            *((None, None, None) if screen is None else (screen.data, screen.scales, screen.errors)),
        )

    def logits(
        self,
        token: int,
        position: Tensor | None,
        cosine: Tensor | None,
        sine: Tensor | None,
        keys: list[Tensor],
        values: list[Tensor],
        length: int,
        needed: Needed = SOFTMAX,
    ) -> tuple[Tensor, Tensor, int]:
        """One token through embeddings, all layers, norm and head; the rest as in `run`.

        position: [H], a learned embedding of the token's place, if the model has such; needed: of a head that is screened,
        as in `screened_linear`. Returns the logits [1, 1, V], the neurons that each FFN
        computed, int64 [layers], and how many logits are exact.
        """
        return self._native.logits(token, position, cosine, sine, keys, values, length, *needed.arguments)

    def run(
        self,
        layers: range,
        x: Tensor,
        delta: Tensor | None,
        cosine: Tensor | None,
        sine: Tensor | None,
        keys: list[Tensor],
        values: list[Tensor],
        length: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token, x [1, 1, H] and the output `delta` of the FFN before, through `layers`, which follow each other.

        cosine, sine [1, 1, D], or None in models without rotary embeddings; keys, values: of each layer [1, heads, capacity, D], filled up to `length`: the token's are
        written there. Returns x, delta and the neurons that each FFN computed (0 where it is whole), int64 [layers]; after
        the last layer x + delta, and the norm of it in place of delta.
        """
        return self._native.run(layers.start, layers.stop, x, delta, cosine, sine, keys, values, length)
