"""The rounding file: values of few bits for a model's weights, chosen on texts (`python -m profiler round`).

A safetensors file with `data.NAME`, `scales.NAME` and, for down projections, which are stored by neuron,
`column_scales.NAME`, each for a weight by its name in the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from transformers_patches.errors import PartInferError
from transformers_patches.files import save_tensors_atomic
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.kernels.formats import WeightFormat, format_named
from transformers_patches.neurons.checks import read_tensors
from transformers_patches.weights.parts import rows_of_part, whole_name
from transformers_patches.weights.source import Source, WeightSource

FORMAT = "partinfer-rounding"
VERSION = "1"


@dataclass
class Rounding:
    """Rounded weights of one model.

    weight_format: of all of them.
    fingerprint: identifies the model.
    weights: by their names in the model. Those of down projections are by neuron and have column scales.
    texts: what they were rounded for, in words.
    """

    weight_format: WeightFormat
    fingerprint: str
    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    texts: str = ""

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {}
        for name, weight in self.weights.items():
            tensors |= {f"data.{name}": weight.data, f"scales.{name}": weight.scales}
            if weight.column_scales is not None:
                tensors[f"column_scales.{name}"] = weight.column_scales
        described = {"format": FORMAT, "version": VERSION, "dtype": self.weight_format.name}
        save_tensors_atomic(path, tensors, described | {"fingerprint": self.fingerprint, "texts": self.texts})

    @classmethod
    def load(cls, path: str | Path) -> Rounding:
        """Read a file; PartInferError if it is damaged or something else."""
        path = Path(path)
        if not path.is_file():
            raise PartInferError(f"no rounding file at {path}: make one with python -m profiler round")
        tensors, metadata = read_tensors(path, "rounding file")
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            raise PartInferError(
                f"{path} is no rounding file of version {VERSION}: make one with python -m profiler round"
            )
        made = cls(
            format_named(metadata.get("dtype", "")), metadata.get("fingerprint", ""), {}, metadata.get("texts", "")
        )
        for name in sorted(name.removeprefix("data.") for name in tensors if name.startswith("data.")):
            data, scales = tensors[f"data.{name}"], tensors.get(f"scales.{name}")
            columns = tensors.get(f"column_scales.{name}")
            made.weights[name] = _checked(path, name, data, scales, columns, made.weight_format)
        return made

    def check_fits(self, fingerprint: str, dtype: str, model: str, source: str | Path) -> None:
        """Raise PartInferError unless it is for this model, and for the type that is asked for."""
        if fingerprint != self.fingerprint:
            raise PartInferError(f"{source} is for another model than {model}: make one with python -m profiler round")
        own = self.weight_format.name
        if dtype != own:
            raise PartInferError(f"{source} holds {own} values, got --dtype {dtype}: give --dtype {own}")

    def named(self, names: dict[str, str]) -> Rounding:
        """The same with the names of a checkpoint's file. names: those in the model -> those in the file."""
        return replace(self, weights={names.get(name, name): weight for name, weight in self.weights.items()})


def _checked(
    path: Path,
    name: str,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    columns: torch.Tensor | None,
    weight_format: WeightFormat,
) -> QuantizedTensor:
    if scales is None or scales.ndim != 2:
        raise PartInferError(f"{path}: the scales of {name} are missing or damaged: make the file again")
    wanted = weight_format.empty(scales.shape[0], scales.shape[1] * weight_format.group, "meta")
    width = scales.shape[1] * weight_format.group
    shapes = [(one.shape, one.dtype) for one in (data, scales)] == [(one.shape, one.dtype) for one in wanted]
    fits = columns is None or (columns.shape == (width,) and columns.dtype == torch.float32)
    if not (
        shapes and fits and all(bool(torch.isfinite(part).all()) for part in (scales, columns) if part is not None)
    ):
        raise PartInferError(f"{path}: the values of {name} don't fit each other: make the file again")
    return QuantizedTensor(data, scales, weight_format, columns)


class RoundedWeights(WeightSource):
    """A WeightSource whose quantised weights are those of a rounding file, as far as it has them.

    What it has not is quantised as always: rows that a fit has changed, down projections of layers that stay whole,
    experts, embeddings and head.

    taken: how many weights came from the file.
    """

    def __init__(self, weights: WeightSource, rounding: Rounding) -> None:
        self.weights, self.rounding, self.source, self.taken = weights, rounding, weights.source, 0

    @property
    def bytes_read(self) -> int:
        return self.weights.bytes_read

    def names(self) -> set[str]:
        return self.weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(name)

    def total_bytes(self) -> int:
        return self.weights.total_bytes()

    def same(self, one: str, other: str) -> bool:
        return self.weights.same(one, other)

    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        self.weights.read_into(name, out, rows)

    def read_columns_into(self, source: Source, out: torch.Tensor) -> None:
        self.weights.read_columns_into(source, out)

    def fill(self, requests: Iterable[tuple[Source, torch.Tensor | QuantizedTensor]]) -> None:
        for source, out in requests:
            held = self._held(source, out)
            if held is None:
                self.weights.fill([(source, out)])
                continue
            self.taken += 1
            if source.left_out is not None:  # a sum of the checkpoint's own columns
                self.weights.fill([(source, out)])
            out.put(slice(None), held)
            if held.column_scales is not None:
                out.column_scales.copy_(held.column_scales)

    def _held(self, source: Source, out: torch.Tensor | QuantizedTensor) -> QuantizedTensor | None:
        """The file's values for what is asked for, if it has them in this layout."""
        held = self.rounding.weights.get(whole_name(source.name))
        if held is None or not isinstance(out, QuantizedTensor) or source.fit is not None or out.in_planes:
            return None
        by_neuron = held.column_scales is not None
        if by_neuron != (source.how == "columns") or by_neuron != (out.column_scales is not None):
            return None
        part = rows_of_part(source.name)
        if part is not None:
            held = held[part]
        if source.neurons is not None:
            held = held.index_select(0, source.neurons)
        return held if held.shape == out.shape else None
