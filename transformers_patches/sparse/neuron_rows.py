"""NeuronRows: the weights of one layer's loaded neurons, and the products with them.

Storage is neuron-major: row i of `gate`, `up` and `down` (the transposed output projection) belongs to the same neuron,
base neurons first. H hidden, L loaded, n some of the loaded neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN

from transformers_patches import kernels
from transformers_patches.kernels import Weight
from transformers_patches.modules.fast_linear import FEW_TOKENS, combine, multiply
from transformers_patches.modules.quantized import QuantizedWeight, weight_of

# transformers' names of activations -> those of the native kernels
KERNEL_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

# How rows lie in memory: each weight by itself; those of gate and down interleaved; and beside that, `up` stored by
# input, [H, L], so that tokens can leave inputs out. Or as PLAIN where files have down by neuron, too: quantised, its
# columns have no scales, for which all of them would have to be read first.
PLAIN, PAIRED, BY_INPUT, BY_ROW = "plain", "paired", "by_input", "by_row"

Rows = dict[str, Weight]  # weights of some neurons by name: gate, up, down [n, H], gate_bias, up_bias [n]


@dataclass(frozen=True)
class Activations:
    """The activations of some neurons at some tokens: [..., n] each.

    first: the activated output of the first input projection: act(gate·x), or act(up·x) in a plain FFN.
    up: up·x; None for a plain FFN.
    h: what enters the output projection.
    """

    first: torch.Tensor
    up: torch.Tensor | None
    h: torch.Tensor


class NeuronRows(nn.Module):
    """The loaded neurons of one layer's FFN, gated (gate, up, down) or plain (up, down).

    This class stands between choosing neurons and having their weights. Everything above it (selections, SparseFFN, the
    loader) knows a neuron by its storage position, 0 to count - 1, and asks here for rows and products. Nothing above
    it knows where rows lie. Here all of them lie in memory, as parameters or QuantizedWeights named as in `row_names`.
    Another kind of rows takes this one's place by having the same methods, as rows_on_demand.py does. A
    mixture-of-experts layer would have the rows of all its experts, so that a position says which expert a neuron
    belongs to.
    """

    on_disk: tuple[kernels.RowsOnDisk, int] | None = None  # of rows that are read when tokens choose them

    def __init__(
        self,
        count: int,
        hidden_size: int,
        activation: str | nn.Module,
        *,
        gated: bool,
        input_bias: bool,
        weight_format: kernels.WeightFormat | None = None,
        native: bool = False,
        layout: str = PLAIN,
    ) -> None:
        """Rows without values, for a loader to fill.

        count: L.
        activation: transformers' name, or a module; PyTorch computes then.
        gated, input_bias: whether there is a gate, and whether the input projections have biases.
        weight_format: of quantised weights; None for floats.
        native: whether few tokens go through the kernels, native or Triton's.
        layout: PLAIN, PAIRED, BY_INPUT or BY_ROW.
        """
        super().__init__()
        self.up_by_input = (
            layout == BY_INPUT
        )  # then neurons can't be taken apart: `first` and `gathered` are for others
        self.count, self.hidden_size = count, hidden_size
        self.gated, self.input_bias = gated, input_bias
        named = isinstance(activation, str)
        self.act_fn = ACT2FN[activation] if named else activation
        self.kernel_activation = KERNEL_ACTIVATIONS.get(activation) if native and named else None
        inputs = ("gate", "up") if gated else ("up",)
        self.weight_names = [*inputs, "down"]
        self.row_names = self.weight_names + ([f"{name}_bias" for name in inputs] if input_bias else [])
        # Weights whose rows are interleaved in memory, because the native kernels read both for scattered neurons.
        self.paired_names = (
            ("gate", "down") if layout in (PAIRED, BY_INPUT) and gated and self.kernel_activation is not None else ()
        )
        for name in self.row_names:
            by_input = self.up_by_input and name == "up"
            shape = (count,) if name.endswith("_bias") else (hidden_size, count) if by_input else (count, hidden_size)
            if weight_format is None or len(shape) == 1:
                setattr(self, name, nn.Parameter(torch.empty(shape), False))
            else:  # columns of down are outputs, of which some are much larger than others
                scaled = (name == "down" and layout != BY_ROW) or by_input
                setattr(self, name, QuantizedWeight(*shape, weight_format, column_scales=scaled))

    @property
    def matrices(self) -> int:
        """Rows of weights that a neuron has."""
        return len(self.weight_names)

    @property
    def row_bytes(self) -> int:
        """Bytes of all stored rows."""
        return sum(self.weight(name).nbytes for name in self.row_names)

    def weight(self, name: str) -> Weight:
        """The stored rows of one of `row_names`, as the kernels take them."""
        return weight_of(getattr(self, name))

    @property
    def activation(self) -> str | Callable[[torch.Tensor], torch.Tensor]:
        """The activation as `kernels.ActiveNeurons` takes it: by name where the native kernels compute."""
        return self.act_fn if self.kernel_activation is None else self.kernel_activation

    def projections(self) -> kernels.Projections:
        """The stored rows of gate, up and down, or of up and down of a plain FFN, with their biases."""
        return kernels.Projections.of([(self.weight(n), getattr(self, f"{n}_bias", None)) for n in self.weight_names])

    def native_fits(self, x: torch.Tensor) -> bool:
        """Whether the native kernels are there for x [B, T, H], and faster."""
        return self.kernel_activation is not None and x.shape[1] <= FEW_TOKENS

    def fetch(self) -> None:
        """Have all rows in memory, for products in PyTorch and for several tokens."""

    def all(self, device: torch.device) -> Rows:
        """All loaded neurons."""
        return self._on_device({name: self.weight(name) for name in self.row_names}, device)

    def first(self, count: int, device: torch.device) -> Rows:
        """The first neurons: views, if the rows are on the device."""
        return self._on_device({name: self.weight(name)[:count] for name in self.row_names}, device)

    def gathered(self, index: torch.Tensor, device: torch.device) -> Rows:
        """A copy of the neurons stored at `index`, int [n]."""
        rows = {name: self.weight(name) for name in self.row_names}
        return self._on_device({name: w.index_select(0, index.to(w.device)) for name, w in rows.items()}, device)

    @staticmethod
    def _on_device(rows: Rows, device: torch.device) -> Rows:
        """The rows where the arithmetic runs."""
        return {name: w.to(device, non_blocking=True) for name, w in rows.items()}

    def activations(self, x: torch.Tensor, rows: Rows) -> Activations:
        """Of the neurons in `rows`, [..., n] each, from x [..., H]."""
        up = self.project(x, rows, "up")
        if not self.gated:
            h = self.act_fn(up)
            return Activations(h, None, h)
        gate = self.act_fn(self.project(x, rows, "gate"))
        return Activations(gate, up, gate * up)

    def project(self, x: torch.Tensor, rows: Rows, name: str) -> torch.Tensor:
        """x [..., H] times the rows of an input projection, with its bias: [..., n]."""
        if name == "up" and self.up_by_input:
            return (kernels.combine if self.kernel_activation is None else combine)(x, rows["up"])
        product = kernels.project if self.kernel_activation is None else multiply
        return product(x, rows[name], rows.get(f"{name}_bias"))

    def combine(self, h: torch.Tensor, rows: Rows) -> torch.Tensor:
        """h [..., n] times the rows of the output projection: [..., H]."""
        return (kernels.combine if self.kernel_activation is None else combine)(h, rows["down"])
