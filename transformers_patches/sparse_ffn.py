"""SparseFFN: holds the loaded neurons of one layer, computes the active ones.

Storage is neuron-major: row i of `gate`, `up` and `down` (the transposed output projection) belongs to the same
neuron, base neurons first. B batch, T tokens, H hidden, L loaded, K active (computed).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from transformers_patches import kernels
from transformers_patches.fast_linear import FEW_TOKENS
from transformers_patches.kernels import Weight
from transformers_patches.load_plan import LayerPlan
from transformers_patches.phase import PREFILL, RequestState
from transformers_patches.quantized import QuantizedWeight, weight_of
from transformers_patches.selection import core_neuron_counts, select_active

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


class SparseFFN(nn.Module):
    """The FFN of one decoder layer over its loaded neurons, gated or plain.

    Takes and returns [B, T, H], or [B*T, H] as OPT has it. While the request is prefilled every loaded neuron is
    computed and the prompt's activations are counted; in decoding the base neurons and those that were selected
    for each sequence.
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
        bits: int | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.state = plan, state
        self.act_fn = ACT2FN[activation]
        self.token_sparsity = token_sparsity
        self.kernel_activation = KERNEL_ACTIVATIONS.get(activation) if native else None
        self.input_bias = input_bias
        inputs = ("gate", "up") if gated else ("up",)
        self.row_names = [*inputs, "down"] + ([f"{name}_bias" for name in inputs] if input_bias else [])
        for name in self.row_names:
            shape = (plan.loaded_count,) if name.endswith("_bias") else (plan.loaded_count, hidden_size)
            quantized = bits is not None and len(shape) == 2
            weight = QuantizedWeight(*shape, bits) if quantized else nn.Parameter(torch.empty(shape), False)
            setattr(self, name, weight)
        self.output_bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False) if output_bias else None
        self.decoded_tokens = self.computed_neurons = 0  # counted where the rows are used
        self._base: Rows | None = None
        self.reset()
        state.layers.append(self)

    def reset(self) -> None:
        """Forget the request."""
        self.counts: list[torch.Tensor] | None = None  # per sequence: int64 [L]
        self.selected: list[torch.Tensor] | None = None  # per sequence: int32 [K - base_count]
        self._chosen: dict[int, Rows] = {}

    def reset_counters(self) -> None:
        self.decoded_tokens = self.computed_neurons = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        x = x.reshape(self.state.batch, self.state.tokens, shape[-1])
        y = self._prefill(x) if self.state.phase == PREFILL else self._decode(x)
        if self.output_bias is not None:
            y = y + self.output_bias
        return y.reshape(shape)

    def weight(self, name: str) -> Weight:
        """The stored rows of one of `row_names`, as the kernels take them."""
        return weight_of(getattr(self, name))

    @property
    def row_bytes(self) -> int:
        """Bytes of all stored rows."""
        return sum(self.weight(name).nbytes for name in self.row_names)

    @property
    def selects(self) -> bool:
        """Whether a prompt chooses some of the neurons."""
        return self.plan.computed_count > self.plan.base_count

    def _prefill(self, x: torch.Tensor) -> torch.Tensor:
        rows = self._on_device({name: self.weight(name) for name in self.row_names}, x.device)
        h = self._activations(x, rows)  # [B, T, L]
        if self.selects:
            self._observe(h)
        return kernels.combine(h, rows["down"])

    def _observe(self, h: torch.Tensor) -> None:
        mask = self.state.token_mask
        if self.counts is None:
            self.counts = [torch.zeros_like(h[0, 0], dtype=torch.int64) for _ in h]
        self.selected, self._chosen = [], {}
        for sequence, (counts, activations) in enumerate(zip(self.counts, h, strict=True)):
            tokens = activations if mask is None else activations[mask[sequence]]
            counts += core_neuron_counts(tokens, self.token_sparsity)
            self.selected.append(select_active(counts, self.plan).to(torch.int32))

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        if self.selects and self.selected is None:
            raise RuntimeError("decoding without a prefilled prompt: run the prompt over an empty cache first")
        y, computed = self._decode_native(x) if self._native_fits(x) else self._decode_torch(x)
        self.decoded_tokens += x.shape[0] * x.shape[1]
        self.computed_neurons += sum(computed) * x.shape[1]
        return y

    def _native_fits(self, x: torch.Tensor) -> bool:
        return self.kernel_activation is not None and x.shape[1] <= FEW_TOKENS

    def _decode_native(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Output and computed neurons per sequence. The kernel takes the prefix and a list: nothing is gathered."""
        base_count, parts, computed = self.plan.base_count, [], []
        weights = [self.weight(name) for name in self.row_names if not name.endswith("_bias")]
        for sequence, part in enumerate(x):
            index = self.selected[sequence] if self.selects else None
            if "gate" in self.row_names:
                biases = {"bias_gate": self.gate_bias, "bias_up": self.up_bias} if self.input_bias else {}
                y = kernels.sparse_ffn(part, *weights, base_count, index, self.kernel_activation, **biases)
            else:
                bias = self.up_bias if self.input_bias else None
                up, down = weights
                y = kernels.sparse_ffn_plain(part, up, bias, down, base_count, index, self.kernel_activation)
            parts.append(y)
            computed.append(base_count + (0 if index is None else len(index)))
        return parts[0][None] if len(parts) == 1 else torch.stack(parts), computed

    def _decode_torch(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Output and computed neurons per sequence."""
        base = self._base_rows(x.device)
        y = torch.zeros_like(x)
        if self.plan.base_count:
            y = kernels.combine(self._activations(x, base), base["down"])
        computed = [self.plan.base_count] * len(x)
        if self.selects:
            chosen = [self._chosen_rows(sequence, x.device) for sequence in range(len(x))]
            pairs = zip(x, chosen, strict=True)
            parts = [kernels.combine(self._activations(part, rows), rows["down"]) for part, rows in pairs]
            y = y + torch.stack(parts)
            computed = [count + len(rows["down"]) for count, rows in zip(computed, chosen, strict=True)]
        return y, computed

    def _activations(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """h: [..., n] from x: [..., H], the activations of n neurons."""
        up = kernels.project(x, rows["up"], rows.get("up_bias"))
        if "gate" not in rows:
            return self.act_fn(up)
        return self.act_fn(kernels.project(x, rows["gate"], rows.get("gate_bias"))) * up

    def _base_rows(self, device: torch.device) -> Rows:
        """The base neurons: a prefix, so views; a copy on the GPU, kept, if the weights stay on the CPU."""
        if self._base is None or self._base["down"].device != device:
            prefix = {name: self.weight(name)[: self.plan.base_count] for name in self.row_names}
            self._base = self._on_device(prefix, device)
        return self._base

    def _chosen_rows(self, sequence: int, device: torch.device) -> Rows:
        """The neurons selected for a sequence, gathered once per prompt."""
        if sequence not in self._chosen:
            index = self.selected[sequence]
            rows = {name: self.weight(name) for name in self.row_names}
            gathered = {name: w.index_select(0, index.to(w.device)) for name, w in rows.items()}
            self._chosen[sequence] = self._on_device(gathered, device)
        return self._chosen[sequence]

    @staticmethod
    def _on_device(rows: Rows, device: torch.device) -> Rows:
        """The rows where the arithmetic runs; a transfer only with memory_limit."""
        return {name: w.to(device, non_blocking=True) for name, w in rows.items()}
