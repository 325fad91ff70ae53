"""Packs: a model folder that holds only the neurons of a load plan, in the plan's order and neuron-major.

A pack is read like the checkpoint that it was made from (it is a WeightSource with the same names), but what loading asks
for lies there as one piece. Files: safetensors shards with their index, config, tokenizer, the neuron files in neurons/, and
pack.json. Tensors: those read whole under their own names; `packed.<name>` [L, …] the planned rows, or columns as rows;
`left_out.<name>` [H] what was summed up of the columns that are not there; `neurons.<number>` [L] which neurons those are.
Names that no weight asks for are passed over, so later versions can add more.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from transformers_patches.checkpoint import Checkpoint, WeightedSum, WeightSource
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.files import sync_folder, write_text_atomic
from transformers_patches.fit_file import FitFile, fit_path
from transformers_patches.neuron_file import NeuronFile

FORMAT, VERSION = "partinfer-pack", 1
DESCRIPTION, NEURONS, INDEX = "pack.json", "neurons", "model.safetensors.index.json"
SHARD_BYTES = 2**30
# settings that decide which neurons are there
FIXED = (
    *("loaded_neurons_percent", "base_neurons_percent", "base_neurons_type", "start_num", "end_num", "compensation"),
    "budget",
)
_NOT_COPIED = (".safetensors", INDEX, ".bin", ".bin.index.json", ".gguf", DESCRIPTION)


def is_pack(folder: str | Path) -> bool:
    return (Path(folder) / DESCRIPTION).is_file()


def pack_settings(folder: str | Path) -> dict:
    """The values of FIXED that a pack was made with; PartInferError if its description can't be read."""
    return _description(Path(folder))["settings"]


def _description(folder: Path) -> dict:
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {content['format']!r} {content['version']!r}, expected {FORMAT!r} {VERSION}")
        (
            {name: content["settings"][name] for name in FIXED},
            content["bytes_dense"],
            content["packed"].items(),
            content["elsewhere"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PartInferError(f"{path} can't be used: {error}; make the pack again") from None
    return content


class Pack(Checkpoint):
    """The weights of a pack. Raises PartInferError where others are asked for than those that it has."""

    def __init__(self, folder: str | Path) -> None:
        self._description = _description(Path(folder))
        super().__init__(folder)
        self._packed: dict[str, dict] = self._description["packed"]
        self._elsewhere: dict[str, list[int]] = self._description["elsewhere"]  # a fit file's, or tied
        self._neurons: dict[int, torch.Tensor] = {}

    def neuron_files(self) -> dict[str, NeuronFile]:
        """The neuron files that the pack was made with, as load_model takes them."""
        paths = {name: self.folder / NEURONS / f"{name}.safetensors" for name in ("dataset_neurons", "model_neurons")}
        return {name: NeuronFile.load(path) for name, path in paths.items() if path.is_file()}

    def names(self) -> set[str]:
        added = ("packed.", "left_out.", "neurons.")
        return {name for name in super().names() if not name.startswith(added)} | {*self._packed, *self._elsewhere}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        if name in self._elsewhere:
            return tuple(self._elsewhere[name])
        return tuple(self._packed[name]["shape"]) if name in self._packed else super().shape(name)

    def total_bytes(self) -> int:
        """Size of the whole checkpoint."""
        return self._description["bytes_dense"]

    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        if name in self._packed:
            self._read_packed(name, "rows", out, rows)
        else:
            super().read_into(name, out, rows)

    def read_columns_into(
        self, name: str, out: torch.Tensor, columns: torch.Tensor, rest: WeightedSum | None = None
    ) -> None:
        if name not in self._packed:
            raise self._other_neurons(name)
        self._read_packed(name, "columns", out, columns)
        if rest is not None:
            if self._packed[name]["left_out"] != _sum_of(rest):
                raise self._other_neurons(name)
            super().read_into(f"left_out.{name}", rest.out)

    def _read_packed(self, name: str, how: str, out: torch.Tensor, wanted: torch.Tensor | None) -> None:
        entry = self._packed[name]
        ours = self._neurons_of(entry["neurons"])
        if wanted is None or how != entry["how"]:
            raise self._other_neurons(name)
        place = int((ours == wanted[0]).nonzero()[0]) if bool((ours == wanted[0]).any()) else len(ours)
        if not torch.equal(ours[place : place + len(wanted)], wanted):
            raise self._other_neurons(name)
        part = None if len(wanted) == len(ours) else torch.arange(place, place + len(wanted))
        super().read_into(f"packed.{name}", out, part)

    def _neurons_of(self, number: int) -> torch.Tensor:
        if number not in self._neurons:
            name = f"neurons.{number}"
            if name not in self._files:
                raise PartInferError(f"{self.source} lacks {name}: make the pack again")
            self._neurons[number] = torch.empty(super().shape(name), dtype=torch.int64)
            super().read_into(name, self._neurons[number])
        return self._neurons[number]

    def _other_neurons(self, name: str) -> PartInferError:
        made = self._description["settings"]
        used = " ".join(f"--{key} {value}" for key, value in made.items() if value is not None)
        return PartInferError(
            f"{self.source} holds other neurons of {name} than these settings need: it was packed with {used}; "
            "use these, or pack the model again"
        )


def _sum_of(rest: WeightedSum | None) -> int | None:
    """Tells sums over other columns or with other weights apart."""
    return (
        None if rest is None else zlib.crc32(rest.weights.numpy().tobytes(), zlib.crc32(rest.columns.numpy().tobytes()))
    )


class _Recorder:
    """A WeightSource that writes down what is read from another one."""

    def __init__(self, weights: WeightSource, folder: Path) -> None:
        self.weights, self.folder, self.source = weights, folder, weights.source
        self.names, self.shape, self.total_bytes = weights.names, weights.shape, weights.total_bytes
        self.packed: dict[str, dict] = {}
        self.bytes_written = 0
        self._shards: list[str] = []
        self._places: dict[str, str] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._numbers: dict[int, int] = {}

    @property
    def bytes_read(self) -> int:
        return self.weights.bytes_read

    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        self.weights.read_into(name, out, rows)
        if rows is None:
            self._keep(name, out)
        else:
            self._keep_packed(name, "rows", out, rows, None)

    def read_columns_into(
        self, name: str, out: torch.Tensor, columns: torch.Tensor, rest: WeightedSum | None = None
    ) -> None:
        self.weights.read_columns_into(name, out, columns, rest)
        self._keep_packed(name, "columns", out, columns, rest)
        if rest is not None:
            self._keep(f"left_out.{name}", rest.out)

    def _keep_packed(
        self, name: str, how: str, out: torch.Tensor, rows: torch.Tensor, rest: WeightedSum | None
    ) -> None:
        number = self._numbers.setdefault(id(rows), len(self._numbers))  # the plan keeps them alive
        self._keep(f"neurons.{number}", rows.to(torch.int32))
        self._keep(f"packed.{name}", out)
        shape = list(self.shape(name))
        self.packed[name] = {"how": how, "neurons": number, "shape": shape, "left_out": _sum_of(rest)}

    def _keep(self, name: str, values: torch.Tensor) -> None:
        if name in self._places:
            return
        self._waiting[name] = values.detach().clone()  # the loader may change what it was given
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= SHARD_BYTES:
            self.flush()

    def unread(self) -> set[str]:
        """Names of the checkpoint that loading did not need, once all is flushed."""
        return set(self.names()) - set(self._places) - set(self.packed)

    def flush(self) -> None:
        """Write what is waiting, and the index of all there is."""
        if self._waiting:
            shard = f"model-{len(self._shards) + 1:05}.safetensors"
            save_file(self._waiting, self.folder / shard, metadata={"format": "pt"})
            with open(self.folder / shard, "rb") as written:
                os.fsync(written.fileno())
            self._shards.append(shard)
            self._places.update(dict.fromkeys(self._waiting, shard))
            self.bytes_written += sum(tensor.nbytes for tensor in self._waiting.values())
            self._waiting = {}
        write_text_atomic(self.folder / INDEX, json.dumps({"weight_map": self._places}, indent=1))


def write_pack(
    folder: str | Path,
    output: str | Path,
    settings: PartInferConfig,
    dataset_neurons: NeuronFile | None = None,
    model_neurons: NeuronFile | None = None,
) -> dict:
    """Make a pack of a checkpoint folder by loading it once. Returns the pack's description, and its `bytes`.

    settings: what is planned, and the type of the weights; neuron files: as load_model takes them. The folder is written
    under another name first, so it is whole or not there. Raises PartInferError for what load_model refuses, settings
    without partial loading, quantised types, and an output folder that exists.
    """
    source, output = Path(folder), Path(output)
    if output.exists():
        raise PartInferError(f"{output} is there already: remove it, or give another --output")
    if not source.is_dir():
        raise PartInferError(f"packs are made of checkpoint folders, got {source}")
    if is_pack(source):
        raise PartInferError(f"{source} is a pack already: give the model that it was made from")
    if not settings.use_partial_loading:
        raise PartInferError("a pack holds the neurons of partial loading: add --use_partial_loading")
    if settings.dtype.startswith("int"):
        raise PartInferError(f"packs hold float weights, got --dtype {settings.dtype}: quantise when loading the pack")
    temporary = output.with_name(f".{output.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / NEURONS).mkdir(parents=True)
        description = _fill(temporary, source, settings, dataset_neurons, model_neurons)
        os.replace(temporary, output)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return description


def _fill(folder: Path, source: Path, settings: PartInferConfig, *neurons: NeuronFile | None) -> dict:
    from transformers_patches.loading import load_from, read_config  # which read packs, too
    from transformers_patches.resolve import find_fit

    given = (settings.dataset_neurons_filepath, settings.model_neurons_filepath)
    neurons = [
        NeuronFile.load(path) if file is None and path else file for file, path in zip(neurons, given, strict=True)
    ]
    recorder = _Recorder(Checkpoint(source), folder)
    plain = replace(settings, kernels="torch", device="cpu", memory_limit=False)
    loaded = load_from(recorder, read_config(source), plain, *neurons, source.resolve().name)
    recorder.flush()
    fit = find_fit(settings, *neurons)
    for name, file in zip(("dataset_neurons", "model_neurons"), neurons, strict=True):
        if file is not None:
            path = folder / NEURONS / f"{name}.safetensors"
            file.save(path)
            if fit is not None:
                FitFile.save(fit, fit_path(path))
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    layers = list(loaded.plan.layers)
    made = {name: getattr(loaded.settings, name) for name in FIXED}
    description = {
        "format": FORMAT,
        "version": VERSION,
        "made_from": source.resolve().name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "settings": made | {"start_num": layers[0], "end_num": layers[-1]},
        "bytes": recorder.bytes_written,
        "bytes_dense": loaded.report.bytes_dense,
        "packed": recorder.packed,
        "elsewhere": {name: list(recorder.shape(name)) for name in sorted(recorder.unread())},
    }
    write_text_atomic(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    return description
