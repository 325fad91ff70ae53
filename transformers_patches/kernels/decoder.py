"""The decoder layers of a model in one native object, which takes a token through many of them in a single call."""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_patches.errors import PartInferError
from transformers_patches.kernels.layer import ActiveNeurons, AttentionLayer, Projections
from transformers_patches.kernels.screening import SOFTMAX, Needed, Screen


class _Reading:
    """Turns the error about a file of weights that can't be read into a PartInferError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError) and "can't be read" in str(error):
            raise PartInferError(str(error).splitlines()[0]) from None


class Decoder:
    """Layers are added once; what their FFNs compute can be set again for every prompt.

    Needs the native kernels. Methods raise ValueError for arguments that don't fit.
    """

    def __init__(self) -> None:
        self._native = torch.classes.partinfer.Decoder()

    def add_layer(self, layer: AttentionLayer, head_size: int) -> None:
        """Add the next layer's attention. Its FFN must be set before `run`."""
        if layer.inputs is not None:
            self._add_by_input(layer, head_size)
            return
        p = layer.projections
        weights = (p.weights, p.scales, p.biases, p.native_code)
        self._native.add_layer(*layer.norm_arguments, *weights, layer.window, layer.scale, head_size)

    def _add_by_input(self, layer: AttentionLayer, head_size: int) -> None:
        data, scales, columns, codes = zip(*(part.parts for part in layer.inputs), strict=True)
        packed = ([], []) if scales[0] is None else (list(scales), [c for c in columns if c is not None])
        vectors, thresholds = [v for p in layer.inputs for v in p.vectors], [p.threshold for p in layer.inputs]
        weights = (list(data), *packed, codes[0], vectors, thresholds)
        self._native.add_layer_by_input(
            *layer.norm_arguments, *weights, layer.window, layer.scale, head_size, layer.kv_heads
        )

    def set_input_thresholds(self, number: int, attention: float, output: float) -> None:
        """Change what the attention of layer `number`, which is stored by input, reads: the thresholds of `ByInput`."""
        self._native.set_input_thresholds(number, attention, output)

    def take_counts(self) -> Tensor:
        """What the layers have read since this was last called, summed over the tokens: int64 [layers, 5].

        Inputs of q, k and v; of o; of up; neurons (rows of gate); rows of down. Inputs are counted where a weight is
        stored by input, neurons and rows of down where tokens choose neurons by up.
        """
        return self._native.take_counts()

    def set_dense(self, number: int, projections: Projections, activation: str) -> None:
        """Give layer `number` a dense FFN, as in `kernels.dense_ffn`."""
        p = projections
        self._native.set_dense(number, p.weights, p.scales, p.biases, p.native_code, activation)

    def set_active(self, number: int, active: ActiveNeurons) -> None:
        """Give layer `number` an FFN over some neurons, as in `kernels.ffn`; `active.native` must be True."""
        if not active.native:
            raise ValueError("the native decoder can't compute these neurons: see ActiveNeurons.native")
        p, keep_count = active.projections, -1 if active.keep_count is None else active.keep_count
        weights = (p.weights, p.scales, p.column_scales, p.biases, p.native_code)
        choice = (active.prefix, active.index, active.size, keep_count, active.threshold)
        up = active.up
        if active.on_disk is not None:
            self._set_on_disk(number, active, choice)
            return
        inputs = ([], None, -1.0) if up is None else (up.vectors, up.parts[2], up.threshold)
        down = (active.down_size, active.down_threshold)
        self._native.set_active(number, *weights, active.activation, *choice, list(active.added), *inputs, *down)

    def _set_on_disk(self, number: int, active: ActiveNeurons, choice: tuple) -> None:
        rows, layer = active.on_disk
        p, (prefix, index, size, keep_count, threshold) = active.projections, choice
        up = (p.weights[1], p.scales[1] if p.scales else None, p.column_scales, p.native_code)
        kept = (prefix, index, size, keep_count, threshold, list(active.added))
        self._native.set_active_on_disk(number, rows.native, layer, *up, active.activation, *kept)

    def set_norm(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        """Set the norm after the last layer, [H]: an RMSNorm, or with a bias a LayerNorm.

        All layers must have been added.
        """
        self._native.set_norm(weight, bias, eps)

    def set_embedding_and_head(self, embedding: Projections, head: Projections, screen: Screen | None = None) -> None:
        """Set the token embeddings [V, H] and the lm_head [V, H], which `logits` needs. The norm must have been set.

        screen: what the lm_head is screened with (`kernels.screened_linear`), or None.
        """
        embeddings = (embedding.weights, embedding.scales, embedding.native_code)
        heads = (head.weights, head.scales, head.biases, head.native_code)
        screens = (None, None, None) if screen is None else (screen.data, screen.scales, screen.errors)
        self._native.set_embedding_and_head(*embeddings, *heads, *screens)

    def logits(
        self,
        token: int,
        position: Tensor | None,
        rope: tuple[Tensor, Tensor] | tuple[None, None],
        caches: tuple[list[Tensor], list[Tensor]],
        length: int,
        needed: Needed = SOFTMAX,
    ) -> tuple[Tensor, Tensor, int]:
        """Take one token through embeddings, all layers, norm and lm_head.

        position: [H], the learned embedding of the token's position, or None.
        needed: which logits must be exact if the lm_head is screened.

        The other arguments are those of `run`. Returns the logits [1, 1, V], how many neurons each FFN computed, int64
        [layers], and how many logits are exact.
        """
        with _Reading():
            return self._native.logits(token, position, *rope, *caches, length, *needed.arguments)

    def run(
        self,
        layers: range,
        x: Tensor,
        delta: Tensor | None,
        rope: tuple[Tensor, Tensor] | tuple[None, None],
        caches: tuple[list[Tensor], list[Tensor]],
        length: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one token through consecutive layers.

        x: [1, 1, H], the residual stream.
        delta: [1, 1, H], the output of the FFN before, or None.
        rope: cosines and sines of the position, [1, 1, D] each, or (None, None) for models without rotary embeddings.
        caches: keys and values of each of the layers, [1, heads, capacity, D], filled up to `length`; the token's are
            written there.

        Returns x, delta and how many neurons each FFN computed, int64 [layers] (0 for a dense FFN). After the model's
        last layer x is the sum of both, and delta is the norm of it.
        """
        with _Reading():
            return self._native.run(layers.start, layers.stop, x, delta, *rope, *caches, length)
