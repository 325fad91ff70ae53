"""OnDemandRows: a layer's rows of which `up` is in memory, and those of gate and down are read when tokens choose them.

The native decoder reads what a token has chosen. Everything else (prompts, batches, several tokens at once) has all rows
of the layer read first, in the order of the file, into memory that every layer uses in its turn.
"""

from __future__ import annotations

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.modules.quantized import QuantizedWeight
from transformers_patches.sparse.neuron_rows import NeuronRows, Rows


class OnDemandRows(NeuronRows):
    """NeuronRows whose gate and down are records of `kernels.RowsOnDisk`, once `attach` was called."""

    @property
    def part_bytes(self) -> tuple[int, int]:
        """Bytes of one row of gate, or of down: of its values, and of its scales."""
        like = self.weight("gate")
        if isinstance(like, QuantizedTensor):
            return like.data[:1].nbytes, like.scales[:1].nbytes
        return like[:1].nbytes, 0

    @property
    def record_bytes(self) -> int:
        """Bytes of a neuron's record: both rows, then their scales, padded."""
        return -(-2 * sum(self.part_bytes) // kernels.RECORD_UNIT) * kernels.RECORD_UNIT

    def attach(self, rows: kernels.RowsOnDisk, layer: int) -> None:
        """Take gate and down from a layer of `rows`."""
        self.on_disk, records = (rows, layer), rows.view(layer)
        values, scales = self.part_bytes
        for half, name in enumerate(self.paired_names):
            like = self.weight(name)
            own = records[:, half * values : (half + 1) * values]
            if isinstance(like, QuantizedTensor):
                first = 2 * values + half * scales
                of_groups = records[:, first : first + scales].view(like.scales.dtype)
                packed = like.over(own.view(like.data.dtype), of_groups)
                getattr(self, name).fill(packed)
            else:
                setattr(self, name, nn.Parameter(own.view(like.dtype), requires_grad=False))

    def column_scales(self) -> torch.Tensor | None:
        """Those of down, to be filled."""
        held = self.down
        return held.packed.column_scales if isinstance(held, QuantizedWeight) else None

    def fetch(self) -> None:
        rows, layer = self.on_disk
        rows.fetch(layer)

    def all(self, device: torch.device) -> Rows:
        self.fetch()
        return super().all(device)

    def first(self, count: int, device: torch.device) -> Rows:
        self.fetch()
        return super().first(count, device)

    def gathered(self, index: torch.Tensor, device: torch.device) -> Rows:
        self.fetch()
        return super().gathered(index, device)
