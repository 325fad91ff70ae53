"""LoadedModel: what load_model returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from transformers_patches.config import PartInferConfig
from transformers_patches.kernels import RowsOnDisk
from transformers_patches.modules.screened_head import ScreenedHead
from transformers_patches.plan.load_plan import LoadPlan
from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.by_input_linear import ByInputLinear
from transformers_patches.sparse.cut_ffn import CutFFN
from transformers_patches.sparse.experts import Experts
from transformers_patches.sparse.request import Counters, RequestLayer, RequestState
from transformers_patches.sparse.zeros_ffn import ZerosFFN


@dataclass
class LoadReport:
    """What loading cost. Bytes are of weights."""

    seconds: float  # from the start of loading to its end
    bytes_read: int  # read from disk, those of a fit file included
    bytes_dense: int  # of the whole checkpoint
    bytes_resident: int  # in memory
    bytes_in_file: int = 0  # of weights that stay in their files: read by row, or neurons on demand


class MaskedReading(Protocol):
    """Hooks under which decoded tokens leave out weights that the model itself would read (evaluation/published)."""

    def unread_bytes(self) -> float:
        """Bytes of weights that a decoded token has left out on average since the last reset."""

    def ffn_bytes_fraction(self) -> float:
        """Share of the FFNs' bytes that it has read."""

    def decoded_tokens(self) -> int:
        """How many tokens that is."""

    def reset_counters(self) -> None:
        """Count from 0 again."""


@dataclass
class LoadedModel:
    """A transformers model whose planned layers are SparseFFNs, and what is known about it.

    `model` is used as any transformers model is: the phase of each pass and the selection are taken care of.
    """

    model: PreTrainedModel
    run: ResolvedRun  # what was decided, without its files
    state: RequestState  # the request that the model is working on
    report: LoadReport
    stop_strings: tuple[str, ...] = ()  # that the model's own generation config names
    rows_on_disk: RowsOnDisk | None = None  # what reads neurons on demand, if there are such
    masked: MaskedReading | None = None  # what hooks leave out, if there are such

    @property
    def settings(self) -> PartInferConfig:
        """Those it was loaded with; `auto` is replaced by what was decided."""
        return self.run.settings

    @property
    def plan(self) -> LoadPlan:
        return self.run.plan

    @property
    def device(self) -> torch.device:
        return self.model.device

    def check_weights(self) -> None:
        """Raise PartInferError if a file that weights are mapped from was changed; for the end of what they computed.

        It is done before every prompt, too.
        """
        self.state.check_weights()

    def computed_fraction(self) -> float:
        """Share of the sparse layers' neurons that decode steps computed since the last reset, as counted."""
        tokens = sum(counters.tokens * size for counters, size, _ in self._counted())
        if not tokens:
            return self.plan.loaded_fraction
        return sum(counters.neurons for counters, _, _ in self._counted()) / tokens

    def bytes_fraction(self) -> float:
        """Share of the sparse layers' FFN bytes that decode steps read since the last reset, as counted.

        If nothing was decoded, what a step over all loaded neurons would read. Of a model with hooks that leave out weights:
        of the FFNs of all layers.
        """
        if self.masked is not None:
            return self.masked.ffn_bytes_fraction()
        rows = sum(counters.tokens * size * matrices for counters, size, matrices in self._counted())
        if not rows:
            return self.plan.loaded_fraction
        return sum(counters.rows for counters, _, _ in self._counted()) / rows

    def _counted(self) -> list[tuple[Counters, int, int]]:
        """Of all sparse layers: their counters, the neurons of a whole token, and the rows of a neuron."""
        ffns = [(layer.counters, self.plan.intermediate_size, layer.rows.matrices) for layer in self.state.layers]
        return ffns + [(experts.counters, experts.neurons, experts.rows[0].matrices) for experts in self.state.experts]

    def token_bytes(self) -> int:
        """Bytes of weights that a decoded token has read on average since the last reset.

        If none was decoded, what one would read.

        An input embedding that is not also the lm_head is left out, since a token reads one row of it. A screened
        lm_head counts with what decoded tokens read of it on average.
        """
        head = self.model.get_output_embeddings()
        skipped = sum(layer.rows.row_bytes * (1 - _read_share(layer)) for layer in self.state.layers)
        skipped += sum(part.weight_bytes * (1 - part.read_share) for part in self._by_input())
        if isinstance(head, ScreenedHead):
            skipped += head.unread_bytes()
        skipped += sum(ffn.unread_bytes() for ffn in self._cut_ffns())
        if self.masked is not None:
            skipped += self.masked.unread_bytes()
        return round(self._whole_bytes() - self._unread_expert_bytes() - skipped)

    def whole_token_bytes(self) -> int:
        """Bytes of weights that a token reads if nothing is left out that is loaded, and no logit is screened."""
        return self._whole_bytes() - self.unchosen_expert_bytes()

    def _whole_bytes(self) -> int:
        """Bytes of all weights but those of an input embedding of its own."""
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings()
        return (
            self.report.bytes_resident
            + self.report.bytes_in_file
            - (0 if embedding is head.weight else embedding.nbytes)
        )

    def _unread_expert_bytes(self) -> int:
        """Bytes of experts that a token does not read: those of others than its router chooses, and neurons left out."""
        mixtures = [module for module in self.model.modules() if isinstance(module, Experts)]
        return round(sum(experts.row_bytes * (1 - experts.read_share()) for experts in mixtures))

    def _cut_ffns(self) -> list[CutFFN | ZerosFFN]:
        return [module for module in self.model.modules() if isinstance(module, CutFFN | ZerosFFN)]

    def unchosen_expert_bytes(self) -> int:
        """Bytes of the experts that a token's router does not choose."""
        mixtures = [module for module in self.model.modules() if isinstance(module, Experts)]
        return round(sum(experts.row_bytes * (1 - experts.used / len(experts.rows)) for experts in mixtures))

    def reset_counters(self) -> None:
        head = self.model.get_output_embeddings()
        for counting in (
            *self.state.layers,
            *self.state.experts,
            *self._cut_ffns(),
            *self._by_input(),
            *([head] if isinstance(head, ScreenedHead) else []),
            *([] if self.masked is None else [self.masked]),
        ):
            counting.reset_counters()

    def _by_input(self) -> list[ByInputLinear]:
        return [module for module in self.model.modules() if isinstance(module, ByInputLinear)]


def _read_share(layer: RequestLayer) -> float:
    """Share of a layer's stored rows that a decoded token has read on average; 1 if nothing was decoded."""
    if not layer.counters.tokens:
        return 1.0
    rows = layer.counters.rows / layer.counters.tokens
    return rows / (layer.rows.count * layer.rows.matrices)
