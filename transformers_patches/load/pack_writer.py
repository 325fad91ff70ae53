"""write_pack(): make a pack by loading a model once and writing down what was loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.files import atomic_folder, write_text_atomic
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.load.as_stored import as_stored, names_in_model
from transformers_patches.load.loader import load_from
from transformers_patches.locks import exclusive
from transformers_patches.neurons.fingerprint import fingerprint
from transformers_patches.neurons.fit_file import FitFile, fit_path
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.resolve import RunFiles, find_fit
from transformers_patches.plan.run import ResolvedRun
from transformers_patches.weights.aligned_file import save_aligned
from transformers_patches.weights.file_kinds import is_gguf, is_pack
from transformers_patches.weights.gguf_tokenizer import gguf_tokenizer
from transformers_patches.weights.lookup import model_name
from transformers_patches.weights.mapped_files import forget
from transformers_patches.weights.model_files import open_weights, read_config
from transformers_patches.weights.pack_description import (
    COLUMN_SCALES,
    DESCRIPTION,
    FIXED,
    FORMAT,
    INDEX,
    KEPT,
    LARGEST,
    NEURONS,
    VERSION,
    checksum_of,
)
from transformers_patches.weights.pack_schema import seal
from transformers_patches.weights.parts import whole_name
from transformers_patches.weights.rounding import RoundedWeights, Rounding
from transformers_patches.weights.source import Source, WeightSource, takes_whole_rows

SHARD_BYTES = 2**30
_NOT_COPIED = (".safetensors", INDEX, ".bin", ".bin.index.json", ".gguf", DESCRIPTION)


class _Recorder(WeightSource):
    """A WeightSource that writes down what is read from another one."""

    def __init__(self, weights: WeightSource, folder: Path) -> None:
        self.weights, self.folder, self.source = weights, folder, weights.source
        self.packed: dict[str, dict] = {}
        self.bytes_written = 0
        self._shards: list[str] = []
        self._places: dict[str, str] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._numbers: dict[int, int] = {}
        self._halves: dict[int, tuple[Source, torch.Tensor | QuantizedTensor]] = {}  # by where the other half begins

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
            if isinstance(out, QuantizedTensor):
                self.weights.fill([(source, out)])
                self._keep_packed(source, out)
            elif source.how == "whole":
                self.weights.fill([(source, out)])
                self.keep(source.name, out)
            elif takes_whole_rows(source):
                self.weights.fill([(source, out)])  # the fit file, which is part of the pack, has them
            elif source.how == "columns":
                largest = torch.empty(out.shape[1])
                self.weights.fill([(replace(source, fit=None, largest=largest), out)])
                self.keep(f"{LARGEST}.{source.name}", largest)
                self._keep_packed(source, out)
                if source.fit is not None:
                    out.copy_(source.fit.refitted(out))
            else:
                self.weights.fill([(source, out)])
                self._keep_packed(source, out)

    def _keep_packed(self, source: Source, out: torch.Tensor | QuantizedTensor) -> None:
        """Write what was loaded for a source; if its rows are interleaved with another weight's, both together."""
        first = self._halves.pop(_parts(out)[0][1].data_ptr(), None)
        if first is not None and source.fit is not None and not isinstance(out, QuantizedTensor):
            # loading will change these rows, so they can't stay in the file, and half a pair should not
            self._keep_alone(*first)
            first = None
        if first is not None:
            own, held = first
            for (kind, one), (_, other) in zip(_parts(held), _parts(out), strict=True):
                self.keep(f"{kind}.{own.name}", torch.stack((one, other), 1))
            self._describe(own, held, pair={"first": own.name, "half": 0})
            self._describe(source, out, pair={"first": own.name, "half": 1})
        elif (values := _parts(out)[0][1]).stride(0) == 2 * values[:1].numel():
            self._halves[values.data_ptr() + values[:1].nbytes] = source, out
        else:
            self._keep_alone(source, out)

    def _keep_alone(self, source: Source, out: torch.Tensor | QuantizedTensor) -> None:
        for kind, values in _parts(out):
            self.keep(f"{kind}.{source.name}", values)
        self._describe(source, out)

    def _describe(self, source: Source, out: torch.Tensor | QuantizedTensor, **more: object) -> None:
        """Note down a weight that is not simply there under its name."""
        if isinstance(out, QuantizedTensor):
            more |= {"format": out.format.name, "refitted": source.fit is not None}
            if out.column_scales is not None:
                self.keep(f"{COLUMN_SCALES}.{source.name}", out.column_scales)
        number = None
        if source.neurons is not None:
            number = self._numbers.setdefault(id(source.neurons), len(self._numbers))  # the plan keeps them alive
            self.keep(f"neurons.{number}", source.neurons.to(torch.int32))
        if source.left_out is not None:
            self.keep(f"left_out.{source.name}", source.left_out.out)
        shape, left_out = list(self.shape(source.name)), checksum_of(source.left_out)
        self.packed[source.name] = {"how": source.how, "neurons": number, "shape": shape, "left_out": left_out, **more}

    def keep(self, name: str, values: torch.Tensor) -> None:
        """Write a tensor, with the next shard."""
        if name in self._places or name in self._waiting:
            return
        # a copy, because the loader may change what it was given
        self._waiting[name] = values.detach().clone(memory_format=torch.contiguous_format)
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= SHARD_BYTES:
            self.flush()

    def unread(self) -> set[str]:
        """Names of the checkpoint that loading did not need, once all is flushed."""
        return self.names() - set(self._places) - set(map(whole_name, self.packed))

    def finish(self) -> None:
        """Write the rest. A half whose other half was not read is written by itself."""
        for source, out in self._halves.values():
            self._keep_alone(source, out)
        self._halves = {}
        self.flush()

    def flush(self) -> None:
        """Write what is waiting, and the index of all there is."""
        if self._waiting:
            shard = f"model-{len(self._shards) + 1:05}.safetensors"
            save_aligned(self._waiting, self.folder / shard)
            forget(self.folder / shard)
            self._shards.append(shard)
            self._places.update(dict.fromkeys(self._waiting, shard))
            self.bytes_written += sum(tensor.nbytes for tensor in self._waiting.values())
            self._waiting = {}
        write_text_atomic(self.folder / INDEX, json.dumps({"weight_map": self._places}, indent=1))


def _parts(out: torch.Tensor | QuantizedTensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a packed weight consists of, by kind."""
    return [("data", out.data), ("scales", out.scales)] if isinstance(out, QuantizedTensor) else [("packed", out)]


def write_pack(
    model: str | Path,
    output: str | Path,
    settings: PartInferConfig,
    dataset_neurons: NeuronFile | None = None,
    model_neurons: NeuronFile | None = None,
    rounding: str | Path | None = None,
) -> dict:
    """Make a pack of a checkpoint folder or GGUF file by loading it once. Returns its description, and its `bytes`.

    settings: what is planned, and the type of the weights. Neuron files are given as to load_model.
    rounding: a rounding file, whose values are taken where it has them.

    The folder is written and synced under another name first, so it is whole or not there. Raises PartInferError for
    what load_model refuses, settings without partial loading, a rounding file of another model or format, and an output
    folder that exists or that another process writes.
    """
    source, output = Path(model), Path(output)
    _check_absent(output)
    if is_pack(source):
        raise PartInferError(f"{source} is a pack already: give the model that it was made from")
    if not settings.use_partial_loading:
        raise PartInferError("a pack holds the neurons of partial loading: add --use_partial_loading")
    config = read_config(source)
    experts = family_of(config).experts
    if experts is not None and experts.interleaved:
        raise PartInferError(
            f"{config.model_type}'s experts can't be packed, because columns of gate and up take turns: load the checkpoint itself"
        )
    with exclusive(output):
        _check_absent(output)  # again: another process may just have written it
        with atomic_folder(output) as folder:
            (folder / NEURONS).mkdir()
            return _fill(folder, source, settings, (dataset_neurons, model_neurons), rounding)


def _check_absent(output: Path) -> None:
    if output.exists():
        raise PartInferError(f"{output} is there already: remove it, or give another --output")


def _fill(
    folder: Path,
    source: Path,
    settings: PartInferConfig,
    neurons: tuple[NeuronFile | None, NeuronFile | None],
    rounding: str | Path | None,
) -> dict:
    config = read_config(source)
    rounded = None if rounding is None else _rounded(source, config, settings, rounding)
    recorder = _Recorder(open_weights(source) if rounded is None else rounded, folder)
    # with the kernels of later runs, if this machine has them, so that the pack has the layout of weights in memory
    plain = replace(settings, device="cpu", memory_limit=False)
    files = RunFiles.of(plain, *neurons)
    if plain.loaded_neurons_percent < 1 and any(file.experts is not None for file in files.neurons):
        raise PartInferError("experts in part can't be packed: add --loaded_neurons_percent 1")
    loaded = load_from(recorder, config, plain, files, model_name(source), packed=True)
    recorder.finish()
    run = loaded.run
    _save_neurons(folder / NEURONS, files, run)
    copy_rest(source, folder)
    layers = sorted({*run.plan.layers, *run.plan.experts})
    made = {name: getattr(run.settings, name) for name in (*FIXED, *KEPT)}
    description = {
        "format": FORMAT,
        "version": VERSION,
        "made_from": model_name(source),
        "dtype": run.settings.dtype,
        "head_dtype": run.settings.head_dtype,
        "settings": made | {"start_num": layers[0], "end_num": layers[-1]},
        "bytes": recorder.bytes_written,
        "bytes_dense": loaded.report.bytes_dense,
        "packed": recorder.packed,
        "elsewhere": {name: list(recorder.shape(name)) for name in sorted(recorder.unread())},
    }
    if rounded is not None:
        description["rounded_for"] = rounded.rounding.texts
    write_text_atomic(folder / DESCRIPTION, json.dumps(seal(description), indent=1) + "\n")
    return description


def _rounded(source: Path, config: PretrainedConfig, settings: PartInferConfig, rounding: str | Path) -> RoundedWeights:
    """The model's weights with the values of a rounding file, which must be for it."""
    weights, held = open_weights(source), Rounding.load(rounding)
    names = names_in_model(weights, as_stored(config, weights))

    def read(parameter: str) -> torch.Tensor:
        values = torch.empty(weights.shape(names[parameter]))
        weights.read_into(names[parameter], values)
        return values

    held.check_fits(fingerprint(config, read), settings.dtype, model_name(source), rounding)
    return RoundedWeights(weights, held.named(names))


def _save_neurons(folder: Path, files: RunFiles, run: ResolvedRun) -> None:
    """The neuron files, and the fit file beside each; without its rows where the pack has them quantised."""
    fit = find_fit(run.settings, files.dataset_neurons, files.model_neurons)  # again: loading has freed its rows
    if fit is not None and run.weight_format is not None and run.settings.compensation == "refit":
        fit = replace(fit, layers={number: layer.without_rows() for number, layer in fit.layers.items()})
    for name in ("dataset_neurons", "model_neurons"):
        file = getattr(files, name)
        if file is not None:
            path = folder / f"{name}.safetensors"
            file.save(path)
            if fit is not None:
                FitFile.save(fit, fit_path(path))


def copy_rest(source: Path, folder: Path, skip: tuple[str, ...] = ()) -> None:
    """Config, tokenizer and what else a model folder holds, except `skip`; those of a GGUF file as a folder has them."""
    if is_gguf(source):
        if "config.json" not in skip:
            read_config(source).save_pretrained(folder)
        gguf_tokenizer(source).save_pretrained(folder)
        return
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith((*_NOT_COPIED, *skip)):
            shutil.copyfile(path, folder / path.name)
