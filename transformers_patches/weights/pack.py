"""Pack: reading a model folder that holds only the neurons of a load plan.

A pack is read like the checkpoint that it was made from: it is a WeightSource with the same names. But what loading
asks for is stored there in one piece. pack_description.py says what is in the folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from transformers_patches import kernels
from transformers_patches.config import HEAD_DTYPE, PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.weights import parallel_reads
from transformers_patches.weights.by_row import RowsInFile
from transformers_patches.weights.mapped_files import MappedFiles
from transformers_patches.weights.pack_description import (
    ADDED,
    COLUMN_SCALES,
    DESCRIPTION,
    FIXED,
    LARGEST,
    NEURONS,
    ROPE_FACTORS,
    checksum_of,
    read_description,
)
from transformers_patches.weights.pack_schema import check_tensors, one_line
from transformers_patches.weights.parallel_reads import BLOCK_BYTES, Read, after_all, scratch
from transformers_patches.weights.parts import whole_name
from transformers_patches.weights.safetensors_folder import Checkpoint, Place
from transformers_patches.weights.source import Source, put, put_fitted


class Pack(Checkpoint):
    """The weights of a pack. Raises PartInferError if asked for weights or neurons that it does not hold."""

    def __init__(self, folder: str | Path) -> None:
        self._description = read_description(folder)
        super().__init__(folder)
        self._packed: dict[str, dict] = self._description["packed"]
        self._elsewhere: dict[str, list[int]] = self._description[
            "elsewhere"
        ]  # shapes of weights that the fit file has, or that are tied
        self._neurons: dict[int, torch.Tensor] = {}
        self._mapped = MappedFiles()
        if ROPE_FACTORS in self._files:
            raise PartInferError(
                f"{self.source} is an earlier version's, without the RoPE scaling in its config: pack again"
            )
        try:
            check_tensors(self._description, self._files, self._place)
        except ValueError as error:
            if isinstance(error, PartInferError):
                raise
            raise PartInferError(
                f"{self.source}: its tensors are not those of its {DESCRIPTION}: {one_line(error)}; make the pack again"
            ) from None

    def with_own_type(self, settings: PartInferConfig) -> PartInferConfig:
        """The settings with the pack's types in place of `auto`.

        Raises PartInferError if they ask for other types than it is quantised to.
        """
        ours = self._description["dtype"]
        if settings.dtype not in ("auto", ours) and ours in kernels.FORMATS:
            raise PartInferError(
                f"{self.source} holds {ours} weights, got --dtype {settings.dtype}: leave it out, or pack the model "
                f"again with --dtype {settings.dtype}"
            )
        if settings.dtype == "auto":
            settings = replace(settings, dtype=ours)
        if ours not in kernels.FORMATS:
            return settings
        head = self._description.get("head_dtype", "auto")
        held = HEAD_DTYPE if head == "auto" else head
        if settings.head_dtype not in ("auto", held):
            raise PartInferError(
                f"{self.source} holds its output projection in {held}, got --head_dtype "
                f"{settings.head_dtype}: leave it out, or pack the model again"
            )
        return replace(settings, head_dtype=head)

    def check_unchanged(self) -> None:
        """Raise PartInferError if a file that weights are mapped from was written to or cut off since."""
        self._mapped.check_unchanged()

    def neuron_files(self) -> dict[str, NeuronFile]:
        """The neuron files that the pack was made with, as load_model takes them."""
        paths = {name: self.folder / NEURONS / f"{name}.safetensors" for name in ("dataset_neurons", "model_neurons")}
        return {name: NeuronFile.load(path) for name, path in paths.items() if path.is_file()}

    def names(self) -> set[str]:
        stored = {name for name in super().names() if not name.startswith(ADDED)}
        return stored | {*map(whole_name, self._packed), *self._elsewhere}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        if name in self._elsewhere:
            return tuple(self._elsewhere[name])
        return tuple(self._packed[name]["shape"]) if name in self._packed else super().shape(name)

    def total_bytes(self) -> int:
        """Size of the whole checkpoint."""
        return self._description["bytes_dense"]

    def same(self, one: str, other: str) -> bool:
        """A tied head is not stored a second time."""
        return one in self._elsewhere or other in self._elsewhere

    def _reads(self, source: Source, out: torch.Tensor | QuantizedTensor) -> Iterator[Read]:
        name, entry = source.name, self._packed.get(source.name)
        if entry is None:
            if source.how == "columns" and not (source.fit and source.fit.down is not None):
                raise self._other_neurons(name)
            yield from super()._reads(source, out)
            return
        if source.how != entry["how"]:
            raise self._other_neurons(name)
        part = None if source.how == "whole" else self._part(name, entry["neurons"], source.neurons)
        if entry.get("format"):
            if not isinstance(out, QuantizedTensor) or out.format.name != entry["format"]:
                raise PartInferError(
                    f"{self.source} holds {name} in {entry['format']} only: give the model that it was made from"
                )
            if entry["refitted"] != (source.fit is not None) or (source.fit and source.fit.changes_rows):
                raise self._other_neurons(name)
            for kind, values in (("data", out.data), ("scales", out.scales)):
                place = self._stored(kind, name, entry)
                if kind == "data" and out.in_planes != (len(place.shape) == 3):
                    yield from self._other_layout_reads(name, out)
                    continue
                rows = len(values) if part is None else part.stop
                if (place.dtype, place.shape[1:]) != (values.dtype, values.shape[1:]) or place.rows < rows:
                    raise PartInferError(
                        f"{self.source} has no {out.format.name} in {kind}.{name}: make the pack again"
                    )
                yield from self._packed_reads(kind, name, values, part)
            yield from self._column_scale_reads(name, out)
        else:
            yield from self._float_reads(source, out, part)
        if source.left_out is not None:
            if entry["left_out"] != checksum_of(source.left_out):
                raise self._other_neurons(name)
            yield from self._row_reads(f"left_out.{name}", source.left_out.out)

    def _column_scale_reads(self, name: str, out: QuantizedTensor) -> Iterator[Read]:
        """Packs before version 5 store none; theirs are all 1. (Later packs have been checked to have them.)"""
        if out.column_scales is None:
            return
        if f"{COLUMN_SCALES}.{name}" in self._files:
            yield from self._row_reads(f"{COLUMN_SCALES}.{name}", out.column_scales)
        else:
            out.column_scales.fill_(1)

    def _other_layout_reads(self, name: str, out: QuantizedTensor) -> Iterator[Read]:
        """The data of a head that is stored in planes but needed without them, or the other way round."""
        stored = self._place(f"data.{name}")
        held = scratch(stored.shape, stored.dtype)
        convert = kernels.split_planes if out.in_planes else kernels.join_planes
        yield from self._row_reads(f"data.{name}", held)
        yield after_all(lambda: out.data.copy_(convert(replace(out, data=held)).data))

    def _float_reads(self, source: Source, out: torch.Tensor | QuantizedTensor, part: slice) -> Iterator[Read]:
        quantized = isinstance(out, QuantizedTensor)
        if source.fit is None and not (quantized and out.column_scales is not None):
            yield from self._packed_reads("packed", source.name, out, part, source.column_weights)
            return
        stored, largest = self._stored("packed", source.name, self._packed[source.name]), None
        held = scratch(out.shape, stored.dtype) if quantized else out
        if f"{LARGEST}.{source.name}" in self._files:
            largest = torch.empty(out.shape[1])
            yield from self._row_reads(f"{LARGEST}.{source.name}", largest)
        yield from self._packed_reads("packed", source.name, held, part)
        yield after_all(lambda: put_fitted(source.fit, out, held, largest))

    def mapped(
        self, source: Source, like: torch.Tensor | QuantizedTensor, *, paired: bool
    ) -> torch.Tensor | QuantizedTensor | None:
        entry = self._packed.get(source.name, {})
        if bool(entry.get("pair")) != paired or (source.neurons is not None and not entry):
            return None
        if isinstance(like, QuantizedTensor):
            if entry.get("format") != like.format.name:
                return None
            data, scales = self._in_file("data", source, like.data), self._in_file("scales", source, like.scales)
            return None if data is None or scales is None else like.over(data, scales)
        if entry.get("format") or source.fit is not None:
            return None
        return self._in_file("packed" if entry else "", source, like)

    @property
    def holds_all_neurons(self) -> bool:
        """Whether no neuron of any layer was left out, or changed, when it was packed."""
        made = self._description["settings"]
        return made["loaded_neurons_percent"] == 1 and made["compensation"] in (None, "auto", "none")

    def with_own_neurons(self, settings: PartInferConfig) -> PartInferConfig:
        """The settings as they are, or for methods that load the whole checkpoint: loading all that the pack holds.

        Neurons are then summed in the pack's order. Raises PartInferError if it does not hold all of them.
        """
        if settings.use_partial_loading:
            return settings
        made = {name: value for name, value in self._description["settings"].items() if name in FIXED}
        if not self.holds_all_neurons:
            raise PartInferError(
                f"{self.source} does not hold the model's own neurons, which method {settings.method} needs: it was packed "
                f"with {_as_flags(made)}; add --use_partial_loading to compute those that it has, or take the checkpoint"
            )
        if settings.method == "dense":
            made["selection"] = "auto"  # nothing is chosen
        return replace(settings, use_partial_loading=True, **made)

    def pair(self, first: Source, second: Source) -> list[Place]:
        """Where two weights are stored whose rows are interleaved: [L, 2, …] each, values and, if quantised, scales.

        Raises PartInferError unless they are, with all neurons of the sources, in their order.
        """
        entries = [self._packed.get(source.name, {}) for source in (first, second)]
        halves = [(entry.get("pair") or {}).get("half") for entry in entries]
        if halves != [0, 1] or any(entry.get("refitted") for entry in entries):
            raise PartInferError(
                f"{self.source} has no rows of {first.name} to be read on demand: make the pack again, on a machine with "
                "the native kernels"
            )
        for source, entry in zip((first, second), entries, strict=True):
            self._part(source.name, entry["neurons"], source.neurons)
        kinds = ("data", "scales") if entries[0].get("format") else ("packed",)
        return [self._place(f"{kind}.{first.name}") for kind in kinds]

    def column_scales_into(self, name: str, out: torch.Tensor) -> None:
        """Read the column scales of a packed weight, float32 [H]."""
        parallel_reads.run(self._row_reads(f"{COLUMN_SCALES}.{name}", out))

    @property
    def checksum(self) -> str:
        """Of the description: another pack has another one."""
        return self._description.get("checksum", "")

    def by_row(
        self, source: Source, like: torch.Tensor | QuantizedTensor, rows: RowsInFile
    ) -> torch.Tensor | QuantizedTensor | None:
        entry = self._packed.get(source.name)
        if entry is None:
            return super().by_row(source, like, rows)
        quantized = isinstance(like, QuantizedTensor)
        if entry["how"] != "whole" or not quantized or entry.get("format") != like.format.name:
            return None
        kept = like.data.nbytes // 2 if like.in_planes else 0
        data = self._left_in_file(f"data.{source.name}", like.data, rows, held=kept)
        if data is None:
            return None
        if not like.in_planes:
            scales = self._left_in_file(f"scales.{source.name}", like.scales, rows)
            return None if scales is None else like.over(data, scales)
        scales = torch.empty_like(like.scales, device="cpu")
        parallel_reads.run(self._row_reads(f"scales.{source.name}", scales))
        return like.over(data, scales)

    def _in_file(self, kind: str, source: Source, like: torch.Tensor) -> torch.Tensor | None:
        """A stored tensor where its file is mapped; None unless the whole tensor is wanted, as it is."""
        entry = self._packed.get(source.name, {})
        place = self._stored(kind, source.name, entry)
        if (place.dtype, place.shape) != (like.dtype, tuple(like.shape)):
            return None
        values = self._mapped.tensor(place.path, place.start, place.nbytes)
        if values is None:
            return None
        values = values.view(place.dtype)
        pair = entry.get("pair")
        if pair is None:
            return values.view(place.shape)
        return values.view(place.rows, 2, *place.shape[1:])[:, pair["half"]]

    def _stored(self, kind: str, name: str, entry: dict) -> Place:
        """Where a weight is stored.

        If its rows are interleaved with another's, the shape is its own, but the bytes are those of both.
        """
        pair = entry.get("pair")
        if pair is None:
            return self._place(f"{kind}.{name}" if kind else name)
        both = self._place(f"{kind}.{pair['first']}")
        return replace(both, shape=(both.rows, *both.shape[2:]))

    def _packed_reads(
        self,
        kind: str,
        name: str,
        out: torch.Tensor | QuantizedTensor,
        part: slice | None,
        column_weights: torch.Tensor | None = None,
    ) -> Iterator[Read]:
        """The rows of a weight of the sparse layers.

        part: which rows of the pack; None for all.
        """
        pair = self._packed[name].get("pair")
        if pair is None:
            yield from self._row_reads(f"{kind}.{name}", out, part, column_weights)
            return
        stored = f"{kind}.{pair['first']}"
        place = self._stored(kind, name, self._packed[name])
        row_bytes, columns = place.row_bytes, math.prod(place.shape[1:])
        if isinstance(out, torch.Tensor) and out.stride() == (2 * columns, 1) and out.dtype == place.dtype:
            if pair["half"] == 0:  # both at once: their rows are interleaved in memory as well
                both = out.as_strided((len(out), 2, columns), (2 * columns, columns, 1))
                yield from self._row_reads(stored, both, part)
            return
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(part.start, part.stop, step):
            stop = min(start + step, part.stop)
            places = slice(start - part.start, stop - part.start)
            take = partial(_take_half, place, pair["half"], out, column_weights, places)
            size, floats = (stop - start) * row_bytes, place.floats(stored)
            yield Read(place.path, place.start + start * row_bytes, size, floats=floats, take=take)
        self.bytes_read += row_bytes * (part.stop - part.start) // 2

    def _is_mapped(self, out: torch.Tensor) -> bool:
        return self._mapped.holds(out)

    def _place(self, name: str) -> Place:
        if name not in self._files and whole_name(name) not in self._files:
            raise PartInferError(f"{self.source} lacks {name}: make the pack again")
        return super()._place(name)

    def _part(self, name: str, number: int, wanted: torch.Tensor) -> slice:
        """Where the wanted neurons are among the pack's; PartInferError unless they are consecutive there, in order."""
        ours = self._neurons_of(number)
        first = int((ours == wanted[0]).nonzero()[0]) if bool((ours == wanted[0]).any()) else len(ours)
        if not torch.equal(ours[first : first + len(wanted)], wanted):
            raise self._other_neurons(name)
        return slice(first, first + len(wanted))

    def _neurons_of(self, number: int) -> torch.Tensor:
        if number not in self._neurons:
            name = f"neurons.{number}"
            self._neurons[number] = torch.empty(super().shape(name), dtype=torch.int64)
            self.read_into(name, self._neurons[number])
        return self._neurons[number]

    def _other_neurons(self, name: str) -> PartInferError:
        used = _as_flags(self._description["settings"])
        return PartInferError(
            f"{self.source} holds other neurons of {name} than these settings need: it was packed with {used}; "
            "use these, or pack the model again"
        )


def _as_flags(settings: dict) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items() if value is not None)


def _take_half(
    place: Place,
    half: int,
    out: torch.Tensor | QuantizedTensor,
    column_weights: torch.Tensor | None,
    places: slice,
    block: torch.Tensor,
) -> None:
    """Put one of two weights, whose rows are interleaved in a block, into its place."""
    put(out, places, block.view(place.dtype).view(-1, 2, *place.shape[1:])[:, half], column_weights)
