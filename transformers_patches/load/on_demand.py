"""Rows of gate and down that stay in a pack's file, for the layers of a model that read them on demand."""

from __future__ import annotations

from transformers import PreTrainedModel

from transformers_patches import kernels
from transformers_patches.config import neuron_count
from transformers_patches.errors import PartInferError
from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.rows_on_demand import OnDemandRows
from transformers_patches.weights.file_state import FilesInUse
from transformers_patches.weights.pack import Pack
from transformers_patches.weights.records import records_of
from transformers_patches.weights.source import Source


class RowsOnDemand:
    """What reads neurons for a model's tokens. Without layers that read on demand, it does nothing.

    nbytes: how much of the weights is not in memory.
    """

    def __init__(self) -> None:
        self.rows: kernels.RowsOnDisk | None = None
        self.nbytes = 0
        self._files = FilesInUse()

    def attach(self, model: PreTrainedModel, pack: Pack, sources: dict[str, Source], run: ResolvedRun) -> None:
        """Give the layers their rows.

        sources: where gate and down come from, by their names in the model, with the pack's names of tensors.
        """
        layers = {name: module for name, module in model.named_modules() if isinstance(module, OnDemandRows)}
        if not layers:
            return
        pairs = []
        for name, layer in layers.items():
            if not layer.paired_names:
                raise PartInferError("--on_demand on can't be: the native kernels don't know this model's activation")
            pairs.append(pack.pair(*(sources[f"{name}.{half}"] for half in layer.paired_names)))
        record = next(iter(layers.values())).record_bytes
        records = records_of(pack.folder, pack.checksum, pairs, record)
        places = []
        for layer, place in zip(layers.values(), records, strict=True):
            self._files.add(place.path)
            slots = neuron_count(run.resident, layer.count) if run.resident else 0
            places.append(kernels.RecordPlace(place.path, place.start, place.rows, slots))
            self.nbytes += (place.rows - slots) * record
        try:
            self.rows = kernels.RowsOnDisk(record, places)
        except ValueError as error:
            raise PartInferError(str(error)) from None
        for number, (name, layer) in enumerate(layers.items()):
            layer.attach(self.rows, number)
            if (scales := layer.column_scales()) is not None:
                pack.column_scales_into(sources[f"{name}.down"].name, scales)

    def check_unchanged(self) -> None:
        """Raise PartInferError if a file was written to since."""
        self._files.check_unchanged()
