"""ActivationStatistics: per-neuron sums over tokens; accumulate, merge, save, restore."""

from __future__ import annotations

import torch

from transformers_patches.neuron_file import ACTIVATION_STATISTICS

# How much of h is reduced at a time. On a CPU a block stays in the cache between its passes (2 MB of float32), yet is
# large enough that starting the threads of a pass costs little.
CPU_ELEMENTS, CPU_ROWS, GPU_ROWS = 2**19, 1024, 8192


class NonFiniteActivation(ArithmeticError):
    """NaN or Inf entered the statistics; `layer` says where."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"NaN or Inf among the activations of layer {layer}")
        self.layer = layer


class ActivationStatistics:
    """Sums over tokens of |h|, h, h^2 and of the same for h / ||h||_2, for every layer and neuron.

    What `observe` adds is pending until `commit`, so that an interrupted batch leaves no trace. The sums of a block
    of rows are taken in float32, everything beyond a block in float64. Each layer's sums lie on the device of its
    activations: `[6, N]`, rows in the order of ACTIVATION_STATISTICS. Memory does not grow with the texts.
    """

    def __init__(self, num_layers: int, intermediate_size: int) -> None:
        self.num_layers, self.intermediate_size = num_layers, intermediate_size
        self.tokens = 0
        self._sums: list[torch.Tensor | None] = [None] * num_layers
        self._pending: list[torch.Tensor | None] = [None] * num_layers
        self._scratch: dict[torch.device, torch.Tensor] = {}

    def observe(self, layer: int, h: torch.Tensor) -> None:
        """Add activations h [T, N] of counted tokens (no padding) to the pending sums of a layer."""
        if self._pending[layer] is None:
            self._pending[layer] = _zeros(self.intermediate_size, h.device)
        pending = self._pending[layer]
        for rows in h.split(block_rows(h)):
            pending += block_sums(rows, self._scratch_for(rows))

    def _scratch_for(self, rows: torch.Tensor) -> torch.Tensor:
        scratch = self._scratch.get(rows.device)
        if scratch is None or len(scratch) < len(rows):
            scratch = self._scratch[rows.device] = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        return scratch

    def commit(self, tokens: int) -> None:
        """Take the pending sums, which are over `tokens` tokens, into the totals.

        Raises NonFiniteActivation, and takes nothing, if a sum is NaN or Inf.
        """
        self.check_pending()
        for layer, pending in enumerate(self._pending):
            if pending is None:
                continue
            if self._sums[layer] is None:
                self._sums[layer] = _zeros(self.intermediate_size, pending.device)
            self._sums[layer] += pending
        self.tokens += tokens
        self.discard()

    def check_pending(self) -> None:
        """Raise NonFiniteActivation if a pending sum is NaN or Inf."""
        for layer, pending in enumerate(self._pending):
            if pending is not None and not bool(torch.isfinite(pending.sum())):  # NaN and Inf survive a sum
                raise NonFiniteActivation(layer)

    def discard(self) -> None:
        """Forget the pending sums."""
        for pending in self._pending:
            if pending is not None:
                pending.zero_()

    def sums(self) -> torch.Tensor:
        """The totals: float64 [layers, 6, N] on the CPU."""
        empty = torch.zeros(len(ACTIVATION_STATISTICS), self.intermediate_size, dtype=torch.float64)
        return torch.stack([empty if s is None else s.to("cpu", torch.float64) for s in self._sums])

    def restore(self, sums: torch.Tensor, tokens: int) -> None:
        """Replace the totals by those of `sums` [layers, 6, N] over `tokens` tokens; pending sums are forgotten."""
        self.discard()
        for layer, values in enumerate(sums):
            self._sums[layer] = values.clone() if self._sums[layer] is None else values.to(self._sums[layer])
        self.tokens = tokens

    def means(self) -> dict[str, torch.Tensor]:
        """Per-token means by name: float32 [layers, N] on the CPU. Needs at least one counted token."""
        if not self.tokens:
            raise ValueError("no tokens were counted, so there are no means")
        means = (self.sums() / self.tokens).float()
        return {name: means[:, row].contiguous() for row, name in enumerate(ACTIVATION_STATISTICS)}


def block_rows(h: torch.Tensor) -> int:
    """How many rows of h [T, N] are reduced at a time."""
    if h.device.type != "cpu":
        return GPU_ROWS
    return max(1, min(CPU_ROWS, CPU_ELEMENTS // h.shape[1]))


def block_sums(h: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of h [T, N]: [6, N], rows in the order of ACTIVATION_STATISTICS.

    scratch: float32 [T or more, N], overwritten: fresh memory for every block costs more than the arithmetic.
    Weighted sums are matrix products with two rows of weights, 1 and 1 / ||h||_2, so every power of h is read once for
    both. A token without any activation counts as zeros after normalisation too.
    """
    values = scratch[: h.shape[0]].copy_(h)
    norms = torch.linalg.vector_norm(values, dim=1)
    inverse = torch.where(norms > 0, norms.reciprocal(), 0.0)
    weights = torch.stack([torch.ones_like(inverse), inverse])  # [2, T]
    signed = weights @ values  # [2, N]
    absolute = weights @ values.abs_()
    squared = weights.square() @ values.square_()
    return torch.stack([absolute, signed, squared], dim=1).flatten(0, 1)


def _zeros(intermediate_size: int, device: torch.device) -> torch.Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return torch.zeros(len(ACTIVATION_STATISTICS), intermediate_size, dtype=dtype, device=device)
