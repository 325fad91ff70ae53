"""SparseFFN: holds the loaded neurons of one layer, computes the active ones.

Storage is neuron-major: row i of `gate`, `up` and `down` (the transposed output projection) belongs to the same
neuron, base neurons first. B batch, T tokens, H hidden, L loaded, K active (computed).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.activations import ACT2FN

from transformers_patches import kernels
from transformers_patches.config import TOKEN_SELECTIONS
from transformers_patches.kernels import Weight
from transformers_patches.modules.fast_linear import FEW_TOKENS, combine, multiply
from transformers_patches.modules.quantized import QuantizedWeight, weight_of
from transformers_patches.plan.load_plan import LayerPlan
from transformers_patches.sparse.compensation import Compensation
from transformers_patches.sparse.prior import Prior
from transformers_patches.sparse.prompt_selection import Activations, PromptSelection, SequenceActivations
from transformers_patches.sparse.request import PREFILL, RequestState
from transformers_patches.sparse.token_selection import TokenSelection

# transformers' names of activations -> those of the native kernels
KERNEL_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

Rows = dict[str, Weight]  # weights of some neurons by name: gate, up, down [n, H], gate_bias, up_bias [n]


@dataclass(slots=True)
class Counters:
    """What decoding did since they were reset: tokens, neurons that were computed, rows of weights that were read.

    An object of its own, because setting a number on a module takes microseconds.
    """

    tokens: int = 0
    neurons: int = 0
    rows: int = 0

    def add(self, tokens: int, neurons: int, rows: int) -> None:
        self.tokens += tokens
        self.neurons += neurons
        self.rows += rows


class SparseFFN(nn.Module):
    """The FFN of one decoder layer over its loaded neurons, gated or plain.

    Takes and returns [B, T, H], or [B*T, H] as OPT has it. While the request is prefilled every loaded neuron is
    computed and the prompt's activations are evidence for `selection`; in decoding those neurons are computed that
    it chooses. `compensation`, if set, stands in for neurons that are left out.
    """

    def __init__(
        self,
        plan: LayerPlan,
        state: RequestState,
        hidden_size: int,
        activation: str,
        *,
        gated: bool,
        input_bias: bool,
        output_bias: bool,
        token_sparsity: float,
        native: bool = False,
        weight_format: kernels.WeightFormat | None = None,
        selection: str = "core",
        prior: Prior | None = None,
        compensate_loaded: bool = False,
        token_count: str = "exact",
    ) -> None:
        """selection: a name of config.SELECTIONS; compensate_loaded: whether loaded neurons that are not computed get
        their mean output (prior.mean); token_count: of a selection per token, exact or average."""
        super().__init__()
        self.plan, self.state, self.gated = plan, state, gated
        self.act_fn = ACT2FN[activation]
        self.token_sparsity = token_sparsity
        self.kernel_activation = KERNEL_ACTIVATIONS.get(activation) if native else None
        self.input_bias = input_bias
        inputs = ("gate", "up") if gated else ("up",)
        self.weight_names = [*inputs, "down"]
        self.row_names = self.weight_names + ([f"{name}_bias" for name in inputs] if input_bias else [])
        for name in self.row_names:
            shape = (plan.loaded_count,) if name.endswith("_bias") else (plan.loaded_count, hidden_size)
            if weight_format is None or len(shape) == 1:
                setattr(self, name, nn.Parameter(torch.empty(shape), False))
            else:  # columns of down are outputs, of which some are much larger than others
                setattr(self, name, QuantizedWeight(*shape, weight_format, column_scales=name == "down"))
        self.output_bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False) if output_bias else None
        self.compensation: Compensation | None = None
        self.prior = prior or Prior()
        if selection in TOKEN_SELECTIONS:
            self.selection = TokenSelection(self, selection, average=token_count == "average")
        else:
            self.selection = PromptSelection(self, selection, self.prior.mean if compensate_loaded else None)
        self._base: Rows | None = None
        self.reset()
        self.reset_counters()
        state.layers.append(self)

    def reset(self) -> None:
        """Forget the request."""
        self.choice = object()  # another one whenever decoding is about to compute something else
        self.selection.reset()

    def reset_counters(self) -> None:
        self.counters = Counters()

    @property
    def matrices(self) -> int:
        """Rows of weights that a neuron has."""
        return len(self.weight_names)

    @property
    def paired_names(self) -> tuple[str, ...]:
        """Weights whose rows take turns in memory, because tokens of native kernels read both of neurons here and there."""
        by_up = isinstance(self.selection, TokenSelection) and self.selection.by == "up"
        return ("gate", "down") if by_up and self.kernel_activation is not None else ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        x = x.reshape(self.state.batch, self.state.tokens, shape[-1])
        prefill = self.state.phase == PREFILL
        y = self._prefill(x) if prefill else self._decode(x)
        if self.compensation is not None:
            y = self.compensation.add(y, prefill=prefill)
        if self.output_bias is not None:
            y = y + self.output_bias
        return y.reshape(shape)

    def _prefill(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.all_rows(x.device)
        values = self.activations(x, rows)  # [B, T, L] each
        if self.selection.observes:
            if not self.selection.started:
                self.selection.begin(len(x), x.device)
            self.observe(values, self.state.token_mask)
        return self.combine(values.h, rows)

    def observe(self, values: Activations, token_mask: torch.Tensor | None) -> None:
        """Take activations [B, T, L] as evidence, except where token_mask [B, T] is False; choose by all there is."""
        for sequence in range(len(values.h)):
            self.selection.observe(sequence, SequenceActivations(values, sequence, token_mask))
        self.selection.choose()
        self.choice = object()

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        result = self.selection.decode(x)
        self.counters.add(x.shape[0] * x.shape[1], result.computed, result.rows)
        return result.y

    def active_neurons(self, x: torch.Tensor) -> kernels.ActiveNeurons | None:
        """What one token of a single sequence computes, for the native decoder; None where that is more than it knows.

        x: any hidden states [..., H], for their type.
        """
        if self.kernel_activation is None:
            return None
        active = self.selection.active_neurons(x)
        if active is None:
            return None
        decoding = () if self.compensation is None else (self.compensation.bias_decode,)
        output = () if self.output_bias is None else (self.output_bias,)
        return replace(active, added=(*active.added, *decoding, *output))

    def projections(self) -> kernels.Projections:
        """The stored rows of gate, up and down, or of up and down of a plain FFN, with their biases."""
        return kernels.Projections.of([(self.weight(n), getattr(self, f"{n}_bias", None)) for n in self.weight_names])

    def native_fits(self, x: torch.Tensor) -> bool:
        """Whether the native kernels are there for x [B, T, H], and faster."""
        return self.kernel_activation is not None and x.shape[1] <= FEW_TOKENS

    def activations(self, x: torch.Tensor, rows: Rows) -> Activations:
        """Of n neurons, [..., n] each, from x [..., H]."""
        up = self.project(x, rows, "up")
        if not self.gated:
            h = self.act_fn(up)
            return Activations(h, None, h)
        gate = self.act_fn(self.project(x, rows, "gate"))
        return Activations(gate, up, gate * up)

    def project(self, x: torch.Tensor, rows: Rows, name: str) -> torch.Tensor:
        """x [..., H] times the rows of an input projection, with its bias: [..., n]."""
        product = kernels.project if self.kernel_activation is None else multiply
        return product(x, rows[name], rows.get(f"{name}_bias"))

    def combine(self, h: torch.Tensor, rows: Rows) -> torch.Tensor:
        """h [..., n] times the rows of the output projection: [..., H]."""
        return (kernels.combine if self.kernel_activation is None else combine)(h, rows["down"])

    def weight(self, name: str) -> Weight:
        """The stored rows of one of `row_names`, as the kernels take them."""
        return weight_of(getattr(self, name))

    @property
    def row_bytes(self) -> int:
        """Bytes of all stored rows."""
        return sum(self.weight(name).nbytes for name in self.row_names)

    def all_rows(self, device: torch.device) -> Rows:
        """All loaded neurons."""
        return self._on_device({name: self.weight(name) for name in self.row_names}, device)

    def base_rows(self, device: torch.device) -> Rows:
        """The base neurons: a prefix, so views; a copy on the GPU, kept, if the weights stay on the CPU."""
        if self._base is None or self._base["down"].device != device:
            prefix = {name: self.weight(name)[: self.plan.base_count] for name in self.row_names}
            self._base = self._on_device(prefix, device)
        return self._base

    def gathered_rows(self, index: torch.Tensor, device: torch.device) -> Rows:
        """A copy of the neurons stored at `index`."""
        rows = {name: self.weight(name) for name in self.row_names}
        gathered = {name: w.index_select(0, index.to(w.device)) for name, w in rows.items()}
        return self._on_device(gathered, device)

    @staticmethod
    def _on_device(rows: Rows, device: torch.device) -> Rows:
        """The rows where the arithmetic runs; a transfer only with memory_limit."""
        return {name: w.to(device, non_blocking=True) for name, w in rows.items()}
