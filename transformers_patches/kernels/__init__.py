"""Matrix-vector products for decoding on CPUs: the sparse FFN, linear layers, float and quantised weights.

Native kernels where they can be compiled, plain PyTorch elsewhere: the functions are the same. Meant for 1 to 8 tokens
(any number is right, but from some tokens on PyTorch's matrix products are faster). docs/kernels.md tells how they work.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from transformers_patches.kernels import blockwise, quantization, reference, screening
from transformers_patches.kernels import layer as _layer
from transformers_patches.kernels import native as _native
from transformers_patches.kernels import probe as _probe
from transformers_patches.kernels.blockwise import multiplies_fast
from transformers_patches.kernels.decoder import ActiveNeurons, Decoder
from transformers_patches.kernels.formats import FORMATS, GROUP, INT4, INT8, WeightFormat, format_named
from transformers_patches.kernels.layer import AttentionLayer, Projections
from transformers_patches.kernels.quantization import QuantizedTensor
from transformers_patches.kernels.screening import SOFTMAX, Needed, Screen

__all__ = [
    "FORMATS",
    "GROUP",
    "INT4",
    "INT8",
    "SOFTMAX",
    "ActiveNeurons",
    "AttentionLayer",
    "Decoder",
    "Needed",
    "Projections",
    "QuantizedTensor",
    "Screen",
    "Weight",
    "WeightFormat",
    "add_norm",
    "advise_huge_pages",
    "attention_step",
    "available",
    "bandwidth_probe",
    "combine",
    "core_counts",
    "dense_ffn",
    "dequantize",
    "format_named",
    "join_planes",
    "linear",
    "most_marked",
    "multiplies_fast",
    "project",
    "quantize",
    "screened_linear",
    "sparse_ffn",
    "sparse_ffn_by_up",
    "sparse_ffn_plain",
    "sparse_ffn_plain_by_size",
    "split_planes",
    "sum_of_squares",
    "typical_scale",
    "use_variant",
    "variant",
    "variants",
    "weighted_rows",
    "why_not",
]

Weight = Tensor | QuantizedTensor

_LIBRARY = _native.Library()


def _ops_for(x: Tensor, weight: Weight):
    """The native operations; None where PyTorch has to do the work, for lack of a library, a CPU, or a kernel for the format."""
    ops = _LIBRARY.get()
    if ops is None or not x.is_cpu or (isinstance(weight, QuantizedTensor) and weight.format.native is None):
        return None
    return ops


def available() -> bool:
    """Whether native kernels do the work; builds them if they aren't built yet."""
    return _LIBRARY.get() is not None


def why_not() -> str:
    """Why `available()` is False, or an empty string."""
    _LIBRARY.get()
    return _LIBRARY.why_not


def variants() -> list[str]:
    """The kernel variants that this build and processor can run, slowest first."""
    return list(_LIBRARY.get().variants()) if available() else []


def variant() -> str:
    """The variant in use, or "reference"."""
    return _LIBRARY.get().variant() if available() else "reference"


def use_variant(name: str):
    """Context manager: another variant (one of `variants()`), for comparisons. Not while other threads compute."""
    return _native.variant(_LIBRARY, name)


def sparse_ffn(
    x: Tensor,
    gate: Weight,
    up: Weight,
    down: Weight,
    prefix: int,
    index: Tensor | None,
    activation: str,
    out: Tensor | None = None,
    bias_gate: Tensor | None = None,
    bias_up: Tensor | None = None,
) -> Tensor:
    """The gated FFN over the active neurons, in one pass: sum of act(gate_i·x) (up_i·x) down_i.

    x [..., H] float32, bfloat16 or float16; gate, up, down [L, H], neuron-major (down transposed), each row contiguous, of one
    float type or quantised alike; active neurons = the first `prefix` rows and the rows in `index` (int32, any order,
    each >= prefix, no copy is made); activation silu, gelu, gelu_tanh or relu (rows of down are skipped where h is 0).
    Returns a tensor like x, `out` if given. Sums are kept in float32. Raises ValueError for arguments that don't fit.
    """
    ops = _ops_for(x, gate)
    if ops is None:
        result = reference.sparse_ffn(x, gate, up, down, prefix, index, activation, bias_gate, bias_up)
    elif isinstance(gate, QuantizedTensor):
        result = ops.quant_sparse_ffn(
            x, gate.data, gate.scales, up.data, up.scales, down.data, down.scales, down.column_scales, gate.native_code, prefix,
            index, activation, bias_gate, bias_up,
        )  # fmt: skip
    elif out is not None:
        ops.sparse_ffn_out(x, gate, up, down, prefix, index, activation, bias_gate, bias_up, out)
        return out
    else:
        return ops.sparse_ffn(x, gate, up, down, prefix, index, activation, bias_gate, bias_up)
    return result if out is None else out.copy_(result)


def sparse_ffn_plain(
    x: Tensor,
    fc1: Weight,
    bias1: Tensor | None,
    fc2: Weight,
    prefix: int,
    index: Tensor | None,
    activation: str = "relu",
) -> Tensor:
    """The FFN without a gate (OPT): sum over the active neurons of act(fc1_i·x + bias1_i) fc2_i.

    fc1, fc2 [L, H] (fc2 transposed), bias1 [L] or None; else as in sparse_ffn. fc2's own bias is the caller's.
    """
    ops = _ops_for(x, fc1)
    if ops is None:
        return reference.sparse_ffn(x, fc1, None, fc2, prefix, index, activation, bias1)
    if isinstance(fc1, QuantizedTensor):
        return ops.quant_sparse_ffn_plain(
            x,
            fc1.data,
            fc1.scales,
            bias1,
            fc2.data,
            fc2.scales,
            fc2.column_scales,
            fc1.native_code,
            prefix,
            index,
            activation,
        )
    return ops.sparse_ffn_plain(x, fc1, bias1, fc2, prefix, index, activation)


def sparse_ffn_by_up(
    x: Tensor,
    gate: Weight,
    up: Weight,
    down: Weight,
    candidates_prefix: int,
    candidates_index: Tensor | None,
    scale: Tensor,
    keep_count: int | None = None,
    threshold: float = 0.0,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """The gated FFN over neurons chosen per token: those candidates whose |up_i·x| scale_i is largest.

    `up` is read for all candidates (as `prefix` and `index` in sparse_ffn), gate and down only for the chosen.
    scale [L] float32: how much a unit of up·x is worth, e.g. the gate's typical size times the norm of down's row.
    keep_count: how many are computed, exactly; None: all whose product is above `threshold`. Zeros are never computed.
    Returns the output like x and the number of neurons computed per token, int64 [T].
    """
    ops = _ops_for(x, gate)
    if ops is None:
        return reference.sparse_ffn_by_up(
            x, gate, up, down, candidates_prefix, candidates_index, scale, keep_count, threshold, activation
        )
    choice = (candidates_prefix, candidates_index, scale, -1 if keep_count is None else keep_count, threshold)
    if isinstance(gate, QuantizedTensor):
        return ops.quant_sparse_ffn_by_up(
            x,
            gate.data,
            gate.scales,
            up.data,
            up.scales,
            down.data,
            down.scales,
            down.column_scales,
            gate.native_code,
            *choice,
            activation,
        )
    return ops.sparse_ffn_by_up(x, gate, up, down, *choice, activation)


def sparse_ffn_plain_by_size(
    x: Tensor,
    fc1: Weight,
    bias1: Tensor | None,
    fc2: Weight,
    candidates_prefix: int,
    candidates_index: Tensor | None,
    scale: Tensor,
    keep_count: int | None = None,
    threshold: float = 0.0,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """The FFN without a gate over neurons chosen per token: those with the largest |act(fc1_i·x + bias1_i)| scale_i.

    fc1 is read for all candidates, fc2 only for the chosen; neurons that ReLU leaves at 0 are never among them. Else as
    in sparse_ffn_by_up and sparse_ffn_plain.
    """
    ops = _ops_for(x, fc1)
    if ops is None:
        return reference.sparse_ffn_plain_by_size(
            x, fc1, bias1, fc2, candidates_prefix, candidates_index, scale, keep_count, threshold, activation
        )
    choice = (candidates_prefix, candidates_index, scale, -1 if keep_count is None else keep_count, threshold)
    if isinstance(fc1, QuantizedTensor):
        weights = (fc1.data, fc1.scales, bias1, fc2.data, fc2.scales, fc2.column_scales, fc1.native_code)
        return ops.quant_sparse_ffn_plain_by_size(x, *weights, *choice, activation)
    return ops.sparse_ffn_plain_by_size(x, fc1, bias1, fc2, *choice, activation)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] plus bias [out]: [..., out], like F.linear, but made for a few tokens."""
    ops = _ops_for(x, weight)
    if ops is None:
        return reference.linear(x, weight, bias)
    if isinstance(weight, QuantizedTensor):
        if weight.in_planes:
            return project(x, weight, bias)
        return ops.quant_linear(x, weight.data, weight.scales, weight.native_code, bias)
    return ops.linear(x, weight, bias)


def weighted_rows(h: Tensor, weight: Weight) -> Tensor:
    """h [..., n] times weight [n, H]: [..., H], the weighted sums of the rows, like `combine`, but made for a few tokens."""
    ops = _ops_for(h, weight)
    if ops is None:
        return reference.weighted_rows(h, weight)
    if isinstance(weight, QuantizedTensor):
        return ops.quant_weighted_rows(h, weight.data, weight.scales, weight.column_scales, weight.native_code)
    return ops.weighted_rows(h, weight)


def screened_linear(x: Tensor, weight: Weight, screen: Screen, needed: Needed = SOFTMAX) -> tuple[Tensor, Tensor]:
    """x [..., in] times weight [out, in], of whose outputs only those that matter are computed with it.

    weight: of 8 bits in planes, or floats; screen: `Screen.of` its planes, or of the high plane of its 8-bit values; needed:
    which outputs matter; the others have the errors of a 4-bit weight. Returns [..., out], and for each token how many outputs
    are exact, int64.
    """
    ops = _LIBRARY.get()
    if ops is None or not x.is_cpu:
        return screening.screened_linear(x, weight, screen, needed)
    whole = None if isinstance(weight, QuantizedTensor) else weight
    return ops.screened_linear(x, screen.data, screen.scales, screen.errors, whole, *needed.arguments)


def split_planes(weight: QuantizedTensor) -> QuantizedTensor:
    """An 8-bit weight, int8 [rows, columns], in planes; the scales are shared."""
    ops = _LIBRARY.get()
    if ops is None or not weight.data.is_cpu:
        return quantization.split_planes(weight)
    data = torch.empty(2, len(weight), weight.shape[1] // 2, dtype=torch.uint8)
    ops.split_planes(weight.data, data)
    return replace(weight, data=data)


def join_planes(weight: QuantizedTensor) -> QuantizedTensor:
    """A weight in planes as int8 [rows, columns]; the scales are shared."""
    ops = _LIBRARY.get()
    if ops is None or not weight.data.is_cpu:
        return quantization.join_planes(weight)
    data = torch.empty(weight.shape, dtype=torch.int8)
    ops.join_planes(weight.data, data)
    return replace(weight, data=data)


def project(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] plus bias [out]: [..., out], as F.linear, made for many tokens, on any device.

    Quantised weights become floats of x's type block by block.
    """
    return blockwise.project(x, weight, bias, dequantize)


def combine(h: Tensor, weight: Weight) -> Tensor:
    """h [..., n] times weight [n, H]: [..., H], the weighted sums of the rows; else as `project`."""
    return blockwise.combine(h, weight, dequantize)


def quantize(
    weight: Tensor,
    weight_format: WeightFormat,
    column_weights: Tensor | None = None,
    column_scales: Tensor | None = None,
) -> QuantizedTensor:
    """A float weight [rows, columns] in one of the FORMATS.

    int8: a group's largest value is exact; with column_weights (float32 [columns]) scales from 0.992 to 1.056 times the
    one that makes it so are tried, and the one with the least square error weighted with them is taken. int4: scales from
    0.8 to 1.04 times the exact one (as -8, so a scale may be negative), errors weighted with |value| too. column_scales
    (float32 [columns]): what is quantised is the weight divided by them. Raises PartInferError if columns are no multiple of
    the format's group, or the column weights are others.
    """
    if column_scales is not None:
        return replace(quantize(weight / column_scales, weight_format, column_weights), column_scales=column_scales)
    ops = _LIBRARY.get()
    if ops is None or not weight.is_cpu or weight.ndim != 2 or weight_format.native is None:
        return quantization.quantize(weight, weight_format, column_weights)
    quantization.check_column_weights(column_weights, weight.shape[1])
    packed = QuantizedTensor.empty(*weight.shape, weight_format)
    weights = None if column_weights is None else column_weights.cpu().contiguous()
    ops.quantize(weight.contiguous(), packed.native_code, weights, packed.data, packed.scales)
    return packed


def dequantize(weight: QuantizedTensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The float weight [rows, columns] that a quantised one stands for, in `out` if given."""
    ops = _ops_for(weight.data, weight)
    if ops is None:
        floats = quantization.dequantize(weight, dtype)
        return floats if out is None else out.copy_(floats)
    weight = join_planes(weight) if weight.in_planes else weight
    out = torch.empty(weight.shape, dtype=dtype) if out is None else out
    ops.dequantize(weight.data, weight.scales, weight.native_code, out)
    return out if weight.column_scales is None else out.mul_(weight.column_scales)


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
    """A decoder layer up to its FFN, for one token: (y, its norm) with y = x + delta + attention(norm(x + delta)).

    x, delta [1, 1, H], delta may be None; cosine, sine [1, 1, D]: the position's rotary embedding, if any; keys, values [1, heads,
    capacity, D], contiguous, filled up to `length`: the token's are written there. Everything has x's type, quantised
    projections excepted. Raises ValueError for what doesn't fit.
    """
    ops = _LIBRARY.get()
    position = (cosine, sine, keys, values, length)
    if ops is None or not x.is_cpu or not layer.projections.are_native:
        return _layer.attention_step(x, delta, layer, *position)
    p = layer.projections
    weights = (p.weights, p.scales, p.biases, p.bits)
    return ops.attention_step(x, delta, *layer.norm_arguments, *weights, *position, layer.window, layer.scale)


def dense_ffn(x: Tensor, projections: Projections, activation: str) -> Tensor:
    """The FFN of a layer that is computed whole, for one token x [1, 1, H]; projections: gate, up and down, or fc1 and fc2."""
    ops = _LIBRARY.get()
    if ops is None or not x.is_cpu or not projections.are_native:
        return _layer.dense_ffn(x, projections, activation)
    return ops.dense_ffn(x, projections.weights, projections.scales, projections.biases, projections.bits, activation)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of x + delta, both [1, 1, H], with weight [H]; with a bias [H] LayerNorm."""
    ops = _LIBRARY.get()
    if ops is None or not x.is_cpu:
        return _layer.norm(x + delta, weight, bias, eps)
    return ops.add_norm(x, delta, weight, bias, eps)


def core_counts(h: Tensor, token_sparsity: float) -> Tensor:
    """How many tokens mark each neuron as a core neuron: int64 [L] (CoreInfer, arXiv 2410.18311).

    h: [T, L], the activations of one sequence's prompt tokens, no padding. With P_t the positive activations of
    token t and k = floor(token_sparsity * mean_t P_t), every token marks its k largest positive activations.
    Native only if something else has loaded the kernels already; equal values may then be marked otherwise than by PyTorch.
    """
    if _LIBRARY.ops is None or not h.is_cpu or len(h) == 0:
        return reference.core_counts(h, token_sparsity)
    return _LIBRARY.ops.core_counts(h, token_sparsity)


def most_marked(counts: Tensor, priority: Tensor, first: int, wanted: int) -> Tensor:
    """The `wanted` neurons from `first` on with the largest counts, ascending: int32 [wanted].

    counts, priority: int64 [L]; of equal counts the lowest priority wins (each neuron has its own, from 0 on). Native
    only if something else has loaded the kernels already, with the same result.
    """
    if _LIBRARY.ops is None or not counts.is_cpu:
        return reference.most_marked(counts, priority, first, wanted)
    return _LIBRARY.ops.most_marked(counts, priority, first, wanted)


def sum_of_squares(values: Tensor) -> Tensor:
    """Of each neuron over the tokens: float32 [L] for values [T, L] in float32, bfloat16 or float16.

    Native only if something else has loaded the kernels already; the order of the additions is then another.
    """
    if _LIBRARY.ops is None or not values.is_cpu:
        return reference.sum_of_squares(values)
    return _LIBRARY.ops.sum_of_squares(values)


def typical_scale(sums: Tensor, tokens: int, prior: Tensor | None, prior_tokens: int, norms: Tensor) -> Tensor:
    """sqrt((sums_i + c prior_i²) / (tokens + c)) norms_i with c = prior_tokens > 0: float32 [L].

    sums, prior, norms: float32 [L], sums of squares over `tokens` tokens; without a prior, their mean over tokens and
    neurons stands for its squares. Native only if something else has loaded the kernels already.
    """
    if _LIBRARY.ops is None or not sums.is_cpu:
        return reference.typical_scale(sums, tokens, prior, prior_tokens, norms)
    return _LIBRARY.ops.typical_scale(sums, tokens, prior, prior_tokens, norms)


def bandwidth_probe(nbytes: int = 256 << 20, repetitions: int = 8) -> float:
    """Bytes per second that torch's threads read together from memory, in huge pages: the best of some repetitions."""
    return _probe.bandwidth_probe(_LIBRARY.get(), nbytes, repetitions)


def advise_huge_pages(tensor: Tensor) -> bool:
    """Ask for huge pages behind a new, still unwritten tensor. Reading is then up to a fifth faster; False if refused."""
    return available() and _LIBRARY.get().advise_huge_pages(tensor)
