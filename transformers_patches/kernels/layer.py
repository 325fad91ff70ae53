"""What the operations of a decoder layer take: its linear layers, its attention, the neurons of its FFN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from transformers_patches.kernels.formats import WeightFormat
from transformers_patches.kernels.quantization import QuantizedTensor, Weight
from transformers_patches.kernels.rows_on_disk import RowsOnDisk

Linear = tuple[Weight, Tensor | None]  # weight [out, in] and bias


@dataclass(frozen=True, eq=False)
class Projections:
    """Linear layers that share one weight format, taken apart into the tensors that the native operations take.

    weights: one tensor per layer, floats or the `data` of a QuantizedTensor.
    scales: one tensor per layer, empty for float weights.
    biases: one per layer; None where a layer has none.
    format: how the weights are quantised; None for floats.
    column_scales: float32 [H] of the last layer, or None.
    """

    weights: list[Tensor]
    scales: list[Tensor]
    biases: list[Tensor | None]
    format: WeightFormat | None
    column_scales: Tensor | None = None

    @classmethod
    def of(cls, linears: Sequence[Linear | None]) -> Projections | None:
        """None if a layer is missing, or if the layers differ in weight format."""
        if any(linear is None for linear in linears):
            return None
        weights, biases = [weight for weight, _ in linears], [bias for _, bias in linears]
        formats = {weight.format if isinstance(weight, QuantizedTensor) else weight.dtype for weight in weights}
        if len(formats) != 1:
            return None
        if isinstance(weights[0], QuantizedTensor):
            columns = weights[-1].column_scales
            return cls([w.data for w in weights], [w.scales for w in weights], biases, weights[0].format, columns)
        return cls([weight.detach() for weight in weights], [], biases, None)

    def weight(self, number: int) -> Weight:
        """The weight of one of the layers."""
        data = self.weights[number]
        if self.format is None:
            return data
        last = number in (-1, len(self.weights) - 1)
        return QuantizedTensor(data, self.scales[number], self.format, self.column_scales if last else None)

    @property
    def are_native(self) -> bool:
        """Whether the native kernels support the weight format."""
        return self.format is None or self.format.native is not None

    @property
    def native_code(self) -> int:
        """The native operations' number for the weight format, 0 for floats."""
        return 0 if self.format is None else self.format.native.code


@dataclass(frozen=True, eq=False)
class ByInput:
    """A linear layer that is stored by input, so that a token can leave inputs out.

    Its product with x is constant + the sum of (x_j - mean_j) weight_j over the inputs j that are read: those with
    |x_j - mean_j| norm_j > threshold.

    weight: [in, out].
    mean: float32 [in], what inputs that are not read count as.
    norm: float32 [in], how much inputs weigh.
    constant: float32 [out], the bias and the product with the mean.
    threshold: below 0 all inputs are read.
    """

    weight: Weight
    mean: Tensor
    norm: Tensor
    constant: Tensor
    threshold: float

    @property
    def vectors(self) -> list[Tensor]:
        """The three vectors, as the native operations take them."""
        return [self.mean, self.norm, self.constant]

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """Data, scales, column scales and the native number of the format of the weight."""
        if isinstance(self.weight, QuantizedTensor):
            return self.weight.data, self.weight.scales, self.weight.column_scales, self.weight.native_code
        return self.weight.detach(), None, None, 0


@dataclass(frozen=True, eq=False)
class ActiveNeurons:
    """The FFN over some of a layer's neurons: what `kernels.ffn` and the native Decoder compute.

    Build one when the neurons have been chosen and keep it for all tokens that follow: what the native operations take
    is put together once.

    projections: gate, up and down of a gated FFN, fc1 and fc2 of a plain one, [L, H] each, neuron-major (down and fc2
        are stored transposed). A bias of down or fc2 belongs to no neuron: it goes into `added`.
    activation: silu, gelu, gelu_tanh, relu or relu2 (its square); or a function of a tensor, and PyTorch then computes everything.
    prefix: the first `prefix` neurons are active.
    index: int32, more active neurons, each >= prefix, in any order; or None.
    size: float32 [L]; None: all active neurons are computed. With it, the active neurons are candidates. Every token
        chooses those with the largest |up_i·x| size_i, or in a plain FFN |act(fc1_i·x + b_i)| size_i. The weights
        behind that product are read for all candidates, the others only for the chosen neurons.
    keep_count: how many neurons a token keeps; None: all above `threshold`. Neurons whose product is 0 are never kept.
    threshold: a bound on the product times size, used where keep_count is None.
    added: [H] each, added to the output one after the other.
    by_gate: choose by |act(gate_i·x + b_i)| size_i in a gated FFN. PyTorch then computes everything.
    up: up of a gated FFN that is stored by input; `projections` has its weight, [H, L], in the place of up's.
    down_size: float32 [L]; with it, of the neurons that a token has chosen only rows of down are read for which
        |h_i| down_size_i is above `down_threshold`.
    down_threshold: see down_size.
    on_disk: gate and down are a layer of these rows, by its number there, and what `projections` has for them is where
        `fetch` puts them.
    """

    projections: Projections
    activation: str | Callable[[Tensor], Tensor]
    prefix: int
    index: Tensor | None = None
    size: Tensor | None = None
    keep_count: int | None = None
    threshold: float = 0.0
    added: Sequence[Tensor] = ()
    by_gate: bool = False
    up: ByInput | None = None
    down_size: Tensor | None = None
    down_threshold: float = -1.0
    on_disk: tuple[RowsOnDisk, int] | None = None

    # Whether the native kernels can compute this. PyTorch computes by_gate, biases of a gated FFN that chooses per
    # token, activations other than these by name, and weight formats without a native kernel.
    native: bool = field(init=False, repr=False)
    # What native.py has prepared for all calls.
    native_call: tuple | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        biases = self.projections.biases
        if biases[-1] is not None:
            raise ValueError("the output projection has a bias, which belongs to no neuron: put it into `added`")
        chooses_with_bias = self.size is not None and self.gated and any(bias is not None for bias in biases)
        by_name = isinstance(self.activation, str)
        native = by_name and not self.by_gate and not chooses_with_bias and self.projections.are_native
        object.__setattr__(self, "native", native)
        if (self.up is not None or self.down_size is not None) and (
            self.size is None or not self.gated or self.by_gate
        ):
            raise ValueError("inputs of up and rows of down are chosen by tokens that choose neurons by up")

    @property
    def one_operation(self) -> bool:
        """Whether a native operation of its own computes this; the native decoder computes more."""
        return self.native and self.up is None and self.down_size is None

    @property
    def gated(self) -> bool:
        """Whether there is a gate; if not, the FFN is fc2(act(fc1(x)))."""
        return len(self.projections.weights) == 3

    @property
    def count(self) -> int:
        """Active neurons, or candidates."""
        return self.prefix + (0 if self.index is None else len(self.index))


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """The attention of a decoder layer and the norms around it: what is the same for every token.

    norm: [H], the weight of the norm before the attention.
    next_norm: [H], the weight of the norm before the FFN.
    projections: q, k, v and o; None with `inputs`.
    eps: the epsilon of all norms.
    scale: what the attention scores are multiplied by.
    q_norm: [D], the weight of the RMSNorm of each head's query, or None.
    k_norm: [D], the weight of the RMSNorm of each head's key, or None.
    window: how many positions the sliding window spans; 0: all.
    inputs: instead of `projections`, layers by input: q, k and v one after the other, and o.
    kv_heads: with `inputs`, the key heads.
    norm_bias: [H], or None. With a bias, `norm` is a LayerNorm instead of an RMSNorm.
    next_norm_bias: [H], or None, in the same way for `next_norm`.
    """

    norm: Tensor
    next_norm: Tensor
    projections: Projections | None
    eps: float
    scale: float
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int = 0
    norm_bias: Tensor | None = None
    next_norm_bias: Tensor | None = None
    inputs: tuple[ByInput, ByInput] | None = None
    kv_heads: int = 0

    @property
    def one_operation(self) -> bool:
        """Whether a native operation of its own computes this; the native decoder computes more."""
        return self.inputs is None and self.projections.are_native

    @property
    def norm_arguments(self) -> tuple[list[Tensor], list[Tensor], float]:
        """Norms, their biases and eps, as the native operations take them.

        Raises ValueError if only some have a bias.
        """
        norms = [norm for norm in (self.norm, self.next_norm, self.q_norm, self.k_norm) if norm is not None]
        biases = [bias for bias in (self.norm_bias, self.next_norm_bias) if bias is not None]
        if len(biases) not in (0, len(norms)):
            raise ValueError("a layer's norms must all be RMSNorms or all be LayerNorms")
        return norms, biases, self.eps
