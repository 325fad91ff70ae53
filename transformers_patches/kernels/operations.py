"""The operations, as the rest of the project calls them, and the choice of who computes each one.

native.py and reference.py have the same functions. The native ones compute tensors on the CPU wherever the library is
there, the reference in PyTorch everything else. On GPUs the operations that decode are those of triton/, where Triton is
installed.
"""

from __future__ import annotations

import mmap
import weakref
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from transformers_patches.kernels import blockwise, native, probe, reference, triton
from transformers_patches.kernels.formats import WeightFormat
from transformers_patches.kernels.layer import ActiveNeurons, AttentionLayer, ByInput, Projections
from transformers_patches.kernels.library import LIBRARY
from transformers_patches.kernels.quantization import QuantizedTensor, Weight
from transformers_patches.kernels.screening import SOFTMAX, Needed, Screen


def _operations_for(x: Tensor, known: bool = True) -> ModuleType:
    """Who computes with x: native or reference. Builds the native kernels if they aren't built yet.

    known: whether there are native kernels for what is to be computed, in particular for the format of its weights.
    """
    built = known and x.is_cpu and (LIBRARY.ops is not None or LIBRARY.get() is not None)
    return native if built else reference


def _operations_if_loaded(x: Tensor) -> ModuleType:
    """The same, but the native kernels are neither built nor loaded for it."""
    return native if x.is_cpu and LIBRARY.ops is not None else reference


def _known(weight: Weight) -> bool:
    return not isinstance(weight, QuantizedTensor) or weight.format.native is not None


def _gpu_operations() -> ModuleType:
    """Imports Triton, so call it only for tensors that it can compute with."""
    from transformers_patches.kernels.triton import operations

    return operations


def _gpu_reads(x: Tensor, weight: Weight) -> bool:
    """Whether Triton multiplies x with a weight. PyTorch has fast products of its own for floats."""
    if not triton.computes_on(x.device) or not isinstance(weight, QuantizedTensor):
        return False
    return _gpu_operations().reads(weight, x)


def ffn(x: Tensor, active: ActiveNeurons) -> tuple[Tensor, Tensor]:
    """The FFN over some of a layer's neurons, in one pass over their weights.

    A gated FFN is the sum over i of act(gate_i·x + b_i) (up_i·x + c_i) down_i, a plain one that of act(fc1_i·x + b_i)
    fc2_i. i goes over the active neurons, or with `active.size` over those that each token chooses among them. Vectors
    in `active.added` are added at the end.

    x: [..., H] float32, bfloat16 or float16. Made for up to 8 tokens; with more PyTorch's matrix products are faster.
    Returns y, like x, and how many neurons were computed for each token, int64 [T] on the CPU, T being the number of
    tokens. The native kernels sum in float32. They raise ValueError for arguments that don't fit.
    """
    if triton.computes_on(x.device) and _gpu_operations().computes(x, active):
        return _gpu_operations().ffn(x, active)
    return _operations_for(x, active.one_operation).ffn(x, active)


def stays_on_device(x: Tensor, active: ActiveNeurons) -> bool:
    """Whether `ffn_on_device` computes this without waiting for x's device. The processor never waits for itself."""
    return x.is_cpu or (triton.computes_on(x.device) and _gpu_operations().computes(x, active))


def ffn_on_device(x: Tensor, active: ActiveNeurons, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """`ffn` for what `stays_on_device`: the counts, integers [T], are on x's device.

    threshold: float32 [1] there, takes the place of active.threshold.
    """
    if triton.computes_on(x.device):
        return _gpu_operations().ffn_on_device(x, active, threshold)
    return ffn(x, replace(active, threshold=float(threshold)))


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] plus bias [out]: [..., out]. As F.linear, but made for a few tokens."""
    if _gpu_reads(x, weight):
        return _gpu_operations().linear(x, weight, bias)
    return _operations_for(x, _known(weight)).linear(x, weight, bias)


def weighted_rows(h: Tensor, weight: Weight) -> Tensor:
    """h [..., n] times weight [n, H]: [..., H], weighted sums of the rows. As `combine`, but made for a few tokens."""
    if _gpu_reads(h, weight):
        return _gpu_operations().weighted_rows(h, weight)
    return _operations_for(h, _known(weight)).weighted_rows(h, weight)


def by_input(x: Tensor, layer: ByInput) -> tuple[Tensor, Tensor]:
    """A layer that is stored by input times x [..., in]: [..., out], and the inputs each token has read, int64 [T].

    Made for a few tokens, each of which reads only the rows that it needs.
    """
    if triton.computes_on(x.device) and _gpu_operations().reads(layer.weight, x):
        return _gpu_operations().by_input(x, layer)
    return _operations_for(x, _known(layer.weight)).by_input(x, layer)


def project(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] plus bias [out]: [..., out]. As F.linear, made for many tokens, on any device.

    Quantised weights become floats of x's type block by block.
    """
    return blockwise.project(x, weight, bias, dequantize)


def combine(h: Tensor, weight: Weight) -> Tensor:
    """h [..., n] times weight [n, H]: [..., H], weighted sums of the rows. Made for many tokens, as `project` is."""
    return blockwise.combine(h, weight, dequantize)


def screened_linear(x: Tensor, weight: Weight, screen: Screen, needed: Needed = SOFTMAX) -> tuple[Tensor, Tensor]:
    """x [..., in] times weight [out, in], exact only for the outputs that matter.

    weight: 8 bits in planes, or floats.
    screen: `Screen.of` its planes, or of the high plane of its 8-bit values.
    needed: which outputs matter; the others have the errors of a 4-bit weight.

    Returns the outputs [..., out], and how many of them are exact for each token, int64 [T].
    """
    return _operations_for(x).screened_linear(x, weight, screen, needed)


def quantize(
    weight: Tensor,
    weight_format: WeightFormat,
    column_weights: Tensor | None = None,
    column_scales: Tensor | None = None,
) -> QuantizedTensor:
    """Quantise a float weight [rows, columns] to one of the FORMATS.

    int8: a group's largest value is exact. With column_weights (float32 [columns]) scales from 0.992 to 1.056 times
    that one are tried, and the one with the least weighted square error is taken. int4: scales from 0.8 to 1.04 times
    the exact one (which maps the largest value to -8, so a scale may be negative), errors weighted with |value| too.
    column_scales (float32 [columns]): the weight is divided by them first. Raises PartInferError if columns is not a
    multiple of the format's group size, or if column_weights has another type or shape.
    """
    if column_scales is not None:
        return replace(quantize(weight / column_scales, weight_format, column_weights), column_scales=column_scales)
    operations = _operations_for(weight, weight.ndim == 2 and weight_format.native is not None)
    return operations.quantize(weight, weight_format, column_weights)


def dequantize(weight: QuantizedTensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The float weight [rows, columns] that a quantised one stands for, written to `out` if given."""
    return _operations_for(weight.data, _known(weight)).dequantize(weight, dtype, out)


def split_planes(weight: QuantizedTensor) -> QuantizedTensor:
    """An 8-bit weight, int8 [rows, columns], as two planes of 4 bits. The scales are shared."""
    return _operations_for(weight.data).split_planes(weight)


def join_planes(weight: QuantizedTensor) -> QuantizedTensor:
    """A weight in planes as int8 [rows, columns]. The scales are shared."""
    return _operations_for(weight.data).join_planes(weight)


def attention_step(
    x: Tensor,
    delta: Tensor | None,
    layer: AttentionLayer,
    rope: tuple[Tensor, Tensor] | tuple[None, None],
    cache: tuple[Tensor, Tensor],
    length: int,
) -> tuple[Tensor, Tensor]:
    """A decoder layer up to its FFN, for one token: y = x + delta + attention(norm(x + delta)), and the norm of y.

    x, delta: [1, 1, H]; delta may be None.
    rope: cosines and sines of the position, [1, 1, D] each, or (None, None).
    cache: keys and values, [1, heads, capacity, D] each, contiguous, filled up to `length`; the token's are written
        there.

    All tensors have x's type, except for quantised projections. The native kernels raise ValueError for arguments that
    don't fit.
    """
    return _operations_for(x, layer.one_operation).attention_step(x, delta, layer, rope, cache, length)


def dense_ffn(x: Tensor, projections: Projections, activation: str) -> Tensor:
    """A dense FFN for one token x [1, 1, H].

    projections: gate, up and down, or fc1 and fc2, [out, in] as in nn.Linear.
    """
    return _operations_for(x, projections.are_native).dense_ffn(x, projections, activation)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of x + delta, both [1, 1, H], with weight [H]; with a bias [H] LayerNorm."""
    return _operations_for(x).add_norm(x, delta, weight, bias, eps)


def core_counts(h: Tensor, token_sparsity: float) -> Tensor:
    """How many tokens mark each neuron as a core neuron: int64 [L] (CoreInfer, arXiv 2410.18311).

    h: [T, L], the activations of one sequence's prompt tokens, no padding. With P_t the number of positive activations
    of token t and k = floor(token_sparsity * mean_t P_t), every token marks its k largest positive activations. Native
    only if the library is already loaded. Which of several equal values are marked may differ from PyTorch.
    """
    return (_operations_if_loaded(h) if len(h) else reference).core_counts(h, token_sparsity)


def most_marked(counts: Tensor, priority: Tensor, first: int, wanted: int) -> Tensor:
    """The `wanted` neurons from `first` on with the largest counts, in ascending order: int32 [wanted].

    counts, priority: int64 [L]. Of equal counts the lowest priority wins; no two neurons have the same, and none is
    below 0. Native only if the library is already loaded, with the same result.
    """
    return _operations_if_loaded(counts).most_marked(counts, priority, first, wanted)


def sum_of_squares(values: Tensor) -> Tensor:
    """The sum of each neuron's squares over tokens: float32 [L] for values [T, L] in float32, bfloat16 or float16.

    Native only if the library is already loaded; it adds in another order.
    """
    return _operations_if_loaded(values).sum_of_squares(values)


def typical_scale(sums: Tensor, tokens: int, prior: Tensor | None, prior_tokens: int, norms: Tensor) -> Tensor:
    """sqrt((sums_i + c prior_i²) / (tokens + c)) norms_i with c = prior_tokens > 0: float32 [L].

    sums, prior, norms: float32 [L]; sums are sums of squares over `tokens` tokens. Without a prior, their mean over
    tokens and neurons takes the place of its squares. Native only if the library is already loaded.
    """
    return _operations_if_loaded(sums).typical_scale(sums, tokens, prior, prior_tokens, norms)


def unpack_blocks(packed: Tensor, kind: str, columns: int) -> Tensor | None:
    """Floats [rows, columns] of GGUF blocks, uint8 [rows, bytes]; None for a kind that the kernels don't know.

    kind: as ggml names it, such as Q4_K. None, too, if the kernels aren't loaded already.
    """
    if LIBRARY.ops is None:
        return None
    out = torch.empty(len(packed), columns)
    return out if LIBRARY.ops.unpack_blocks(packed, kind, out) else None


def bandwidth_probe(nbytes: int = 256 << 20, repetitions: int = 8) -> float:
    """Bytes per second that torch's threads together read from memory in huge pages: the best of some repetitions."""
    return probe.bandwidth_probe(LIBRARY.get(), nbytes, repetitions)


def watch_mapping(memory: mmap.mmap, whole: Tensor) -> None:
    """End the process with a line on standard error and exit code 1, not with SIGBUS, where a mapped file has been cut off.

    whole: uint8 [size], all of the mapping. Does nothing without the native kernels.
    """
    ops = LIBRARY.get()
    if ops is not None:
        begin = ops.watch_mapping(whole)
        weakref.finalize(memory, ops.forget_mapping, begin)


def advise_huge_pages(tensor: Tensor) -> bool:
    """Ask for huge pages for a new tensor, before it is written: reading is up to 20 % faster. False if refused."""
    ops = LIBRARY.get()
    return ops is not None and ops.advise_huge_pages(tensor)
