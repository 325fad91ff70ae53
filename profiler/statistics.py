"""Sums over tokens for every neuron, and for the inputs of linear layers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from transformers_patches.neurons.neuron_file import ACTIVATION_STATISTICS

ACTIVATIONS = "activations"  # the name of the sums of h, beside those of inputs
EXPERTS, EXPERT_TOKENS = "experts", "expert_tokens"  # the same of h inside of experts, and of their tokens
# How much of h is reduced at a time. On a CPU a block (2 MB of float32) stays in the cache between its passes, and is
# still large enough that starting the threads for each pass costs little.
CPU_ELEMENTS, CPU_ROWS, GPU_ROWS = 2**19, 1024, 8192


class NonFiniteActivation(ArithmeticError):
    """NaN or Inf among the activations of layer `layer`."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"NaN or Inf among the activations of layer {layer}")
        self.layer = layer


class ActivationStatistics:
    """Sums over tokens of |h|, h and h^2, and of the same for h / ||h||_2, for every neuron; of inputs, sums of x^2.

    Observations are pending until `commit`, so that an interrupted batch leaves no trace. Each block of rows is summed
    in float32, and the blocks in float64. A layer's sums, `[6, N]` with rows in the order of ACTIVATION_STATISTICS, are
    on the device of its activations. Memory does not grow with the number of texts.

    input_widths: the widths of the inputs to observe as well, by their names in INPUT_SQUARES
    experts: how many experts a layer has, and neurons an expert, if there are some
    """

    def __init__(
        self,
        num_layers: int,
        intermediate_size: int,
        input_widths: dict[str, int] | None = None,
        experts: tuple[int, int] | None = None,
    ) -> None:
        self.num_layers, self.intermediate_size = num_layers, intermediate_size
        self.tokens = 0
        self._shapes = {ACTIVATIONS: (num_layers, len(ACTIVATION_STATISTICS), intermediate_size)}
        for name, width in (input_widths or {}).items():
            self._shapes[name] = (1 if name == "head" else num_layers, width)
        if experts is not None:
            count, size = experts
            self._shapes |= {EXPERTS: (num_layers, 2, count, size), EXPERT_TOKENS: (num_layers, count)}
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._pending: dict[tuple[str, int], torch.Tensor] = {}
        self._scratch: dict[tuple[torch.device, int], torch.Tensor] = {}

    @property
    def inputs(self) -> list[str]:
        """The names of the inputs that `observe_input` takes."""
        return [name for name in self._shapes if name not in (ACTIVATIONS, EXPERTS, EXPERT_TOKENS)]

    def observe(self, layer: int, h: torch.Tensor) -> None:
        """Add activations h [T, N] of counted tokens (no padding) to the pending sums of a layer."""
        self._observe(ACTIVATIONS, layer, h, block_sums)

    def observe_expert(self, layer: int, expert: int, h: torch.Tensor) -> None:
        """Add activations h [n, N] of the counted tokens that a router sent to an expert to the pending sums."""
        pending, tokens = (self._pending_of(name, layer, h.device) for name in (EXPERTS, EXPERT_TOKENS))
        values = h.float()
        pending[0, expert] += values.abs().sum(0)
        pending[1, expert] += values.square().sum(0)
        tokens[expert] += len(h)

    def observe_input(self, name: str, layer: int, x: torch.Tensor) -> None:
        """Add inputs x [T, width] of a linear layer to the pending sums. For the output layer, `layer` is 0."""
        self._observe(name, layer, x, block_squares)

    def _observe(
        self, name: str, layer: int, values: torch.Tensor, reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        pending = self._pending_of(name, layer, values.device)
        for rows in values.split(block_rows(values)):
            pending += reduce(rows, self._scratch_for(rows))

    def _pending_of(self, name: str, layer: int, device: torch.device) -> torch.Tensor:
        if (name, layer) not in self._pending:
            self._pending[name, layer] = _zeros(self._shapes[name][1:], device)
        return self._pending[name, layer]

    def _scratch_for(self, rows: torch.Tensor) -> torch.Tensor:
        key = rows.device, rows.shape[1]
        if key not in self._scratch or len(self._scratch[key]) < len(rows):
            self._scratch[key] = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        return self._scratch[key]

    def commit(self, tokens: int) -> None:
        """Add the pending sums, over `tokens` tokens, to the totals.

        Raises NonFiniteActivation, and adds nothing, if a sum is NaN or Inf.
        """
        self.check_pending()
        for key, pending in self._pending.items():
            if key not in self._sums:
                self._sums[key] = torch.zeros_like(pending)
            self._sums[key] += pending
        self.tokens += tokens
        self.discard()

    def check_pending(self) -> None:
        """Raise NonFiniteActivation if a pending sum is NaN or Inf."""
        bad = [key for key, pending in self._pending.items() if not bool(torch.isfinite(pending.sum()))]
        if bad:  # NaN and Inf survive a sum
            raise NonFiniteActivation(min(self.num_layers - 1 if name == "head" else layer for name, layer in bad))

    def discard(self) -> None:
        """Drop the pending sums."""
        for pending in self._pending.values():
            pending.zero_()

    def sums(self) -> dict[str, torch.Tensor]:
        """The totals, float64 on the CPU: [layers, 6, N] for activations, [layers or 1, width] for inputs."""
        return {name: self._stacked(name) for name in self._shapes}

    def _stacked(self, name: str) -> torch.Tensor:
        stacked = torch.zeros(self._shapes[name], dtype=torch.float64)
        for layer, row in enumerate(stacked):
            if (name, layer) in self._sums:
                row.copy_(self._sums[name, layer])
        return stacked

    def restore(self, sums: dict[str, torch.Tensor], tokens: int) -> None:
        """Replace the totals by what `sums` returned, over `tokens` tokens. Pending sums are dropped."""
        self.discard()
        for name, stacked in sums.items():
            for layer, values in enumerate(stacked):
                before = self._sums.get((name, layer))
                self._sums[name, layer] = values.clone() if before is None else values.to(before)
        self.tokens = tokens

    def means(self) -> dict[str, torch.Tensor]:
        """Per-token means by name: float32 [layers, N] on the CPU. At least one token must have been counted."""
        means = self._mean(ACTIVATIONS)
        return {name: means[:, row].contiguous() for row, name in enumerate(ACTIVATION_STATISTICS)}

    def input_squares(self) -> dict[str, torch.Tensor]:
        """Per-token means of x^2 by the names of INPUT_SQUARES: float32 on the CPU."""
        return {name: self._mean(name) for name in self.inputs}

    def expert_means(self, layers: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of these layers: the tokens of each expert, int64 [M, E], and over them mean_abs and rms, float64 [M, E, N]."""
        tokens = self._stacked(EXPERT_TOKENS)[layers]
        sums = self._stacked(EXPERTS)[layers] / tokens.clamp(min=1)[:, None, :, None]
        return tokens.long(), {"mean_abs": sums[:, 0], "rms": sums[:, 1].sqrt()}

    def _mean(self, name: str) -> torch.Tensor:
        if not self.tokens:
            raise ValueError("no tokens were counted, so there are no means")
        return (self._stacked(name) / self.tokens).float()


def block_rows(h: torch.Tensor) -> int:
    """How many rows of h [T, N] are reduced at a time."""
    if h.device.type != "cpu":
        return GPU_ROWS
    return max(1, min(CPU_ROWS, CPU_ELEMENTS // h.shape[1]))


def block_sums(h: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of h [T, N]: [6, N], rows in the order of ACTIVATION_STATISTICS.

    Each sum is a matrix product with two rows of weights, 1 and 1 / ||h||_2, so every power of h is read once for both.
    A token whose activations are all 0 counts as zeros after normalisation too.

    scratch: float32 [T or more, N], overwritten; fresh memory for every block would cost more than the arithmetic
    """
    values = scratch[: h.shape[0]].copy_(h)
    norms = torch.linalg.vector_norm(values, dim=1)
    inverse = torch.where(norms > 0, norms.reciprocal(), 0.0)
    weights = torch.stack([torch.ones_like(inverse), inverse])  # [2, T]
    signed = weights @ values  # [2, N]
    absolute = weights @ values.abs_()
    squared = weights.square() @ values.square_()
    return torch.stack([absolute, signed, squared], dim=1).flatten(0, 1)


def block_squares(x: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Sums of x^2 over the tokens, x [T, width]: [width]. scratch: as for block_sums."""
    values = scratch[: x.shape[0]].copy_(x)
    return values.new_ones(len(values)) @ values.square_()


def _zeros(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return torch.zeros(shape, dtype=dtype, device=device)
