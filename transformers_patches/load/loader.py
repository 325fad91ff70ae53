"""load_model(): build the model on the meta device, swap the planned FFNs, stream the planned weights in."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from transformers_patches.config import HEAD_DTYPE, PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.fast_pass.one_token import speed_up_one_token
from transformers_patches.kernels import FORMATS, QuantizedTensor, WeightFormat
from transformers_patches.load.column_weights import column_weights
from transformers_patches.load.ffn_swap import attach_compensation, swap_ffns
from transformers_patches.modules.fast_linear import native_kernels_wanted, replace_linears
from transformers_patches.modules.quantized import (
    QuantizedEmbedding,
    QuantizedWeight,
    quantize_modules,
    weight_bytes,
    weight_places,
)
from transformers_patches.modules.screened_head import ScreenedHead, can_be_screened, screen_head
from transformers_patches.neurons.fingerprint import fingerprint
from transformers_patches.neurons.fit_file import FitFile
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.load_plan import LoadPlan, build_load_plan
from transformers_patches.plan.resolve import find_fit, resolve_settings
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.sparse.request import RequestState
from transformers_patches.weights.gguf_config import gguf_config
from transformers_patches.weights.gguf_file import is_gguf
from transformers_patches.weights.lookup import model_name
from transformers_patches.weights.memory import WeightMemory, give_back_freed
from transformers_patches.weights.model_files import open_weights
from transformers_patches.weights.pack import Pack
from transformers_patches.weights.source import Source, WeightSource


@dataclass
class LoadReport:
    """What loading cost. Bytes are of weights, those of a fit file included; dense is what the whole checkpoint holds."""

    seconds: float
    bytes_read: int
    bytes_dense: int
    bytes_resident: int


@dataclass
class LoadedModel:
    """A transformers model whose planned layers are SparseFFNs, and what is known about it.

    `model` is used as any transformers model is: the phase of each pass and the selection are taken care of.
    """

    model: PreTrainedModel
    settings: PartInferConfig
    plan: LoadPlan
    state: RequestState
    report: LoadReport

    @property
    def device(self) -> torch.device:
        return self.model.device

    def computed_fraction(self) -> float:
        """Share of the sparse layers' neurons that decode steps computed since the last reset, as counted."""
        tokens = sum(layer.counters.tokens for layer in self.state.layers)
        if not tokens:
            return self.plan.loaded_fraction
        return sum(layer.counters.neurons for layer in self.state.layers) / (tokens * self.plan.intermediate_size)

    def bytes_fraction(self) -> float:
        """Share of the sparse layers' FFN bytes that decode steps read since the last reset, as counted.

        If nothing was decoded, what a step over all loaded neurons would read.
        """
        tokens = sum(layer.counters.tokens for layer in self.state.layers)
        if not tokens:
            return self.plan.loaded_fraction
        matrices = self.state.layers[0].rows.matrices
        read = sum(layer.counters.rows for layer in self.state.layers)
        return read / (tokens * matrices * self.plan.intermediate_size)

    def reset_counters(self) -> None:
        head = self.model.get_output_embeddings()
        for counting in (*self.state.layers, *([head] if isinstance(head, ScreenedHead) else [])):
            counting.reset_counters()


def resolve_device(device: str) -> torch.device:
    """`auto` is cuda if there is one; PartInferError if a named device is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise PartInferError(f"unknown device {device!r}: expected cpu, cuda or cuda:NUMBER") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise PartInferError(f"device {device} is not there ({torch.cuda.device_count()} found): use --device cpu")
    return resolved


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config of a checkpoint folder or GGUF file, without network; PartInferError if it is neither."""
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_config(folder)
    if not (folder / "config.json").is_file():
        raise PartInferError(f"no model at {folder} (config.json is missing): fetch one with python download.py")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:  # damaged, or an architecture that transformers does not know either
        reason = str(error).split(". ")[0].splitlines()[0]
        raise PartInferError(f"{folder / 'config.json'} can't be used: {reason}; fetch the model again") from None


def load_model(
    folder: str | Path,
    settings: PartInferConfig,
    dataset_neurons: NeuronFile | None = None,
    model_neurons: NeuronFile | None = None,
) -> LoadedModel:
    """Load a checkpoint folder, pack or GGUF file as the settings say: of sparse layers planned neurons, all else whole.

    Neuron files that are not given are read from the paths in the settings, if there are any. Raises PartInferError
    for checkpoints and neuron files that are damaged or do not fit each other, before weights are read.
    """
    config = read_config(folder)
    family_of(config)  # an unknown architecture is the first thing to say
    if dataset_neurons is None and settings.dataset_neurons_filepath:
        dataset_neurons = NeuronFile.load(settings.dataset_neurons_filepath)
    if model_neurons is None and settings.model_neurons_filepath:
        model_neurons = NeuronFile.load(settings.model_neurons_filepath)
    weights = open_weights(folder)
    if isinstance(weights, Pack):
        settings = weights.with_own_type(settings)
        if dataset_neurons is None and model_neurons is None:
            files = weights.neuron_files()
            dataset_neurons, model_neurons = files.get("dataset_neurons"), files.get("model_neurons")
    loaded = load_from(weights, config, settings, dataset_neurons, model_neurons, model_name(folder))
    if (Path(folder) / "generation_config.json").is_file():
        loaded.model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return loaded


def load_from(
    weights: WeightSource,
    config: PretrainedConfig,
    settings: PartInferConfig,
    dataset_neurons: NeuronFile | None,
    model_neurons: NeuronFile | None,
    name: str,
) -> LoadedModel:
    """`load_model` for any source of weights. name: the model's, for messages."""
    started = time.perf_counter()
    family = family_of(config)
    names = _names_in_model(weights)
    fit = find_fit(settings, dataset_neurons, model_neurons)
    _check_files(config, weights, names, name, (dataset_neurons, model_neurons), fit)
    base = (
        (model_neurons or dataset_neurons)
        if settings.base_neurons_type == "model"
        else dataset_neurons or model_neurons
    )
    settings, fit = resolve_settings(settings, base, fit, config.num_hidden_layers)
    plan = build_load_plan(settings, config, dataset_neurons, model_neurons, fit)
    fit_bytes = 0 if fit is None else sum(layer.nbytes for layer in fit.layers.values())
    device, (dtype, weight_format) = resolve_device(settings.device), _resolve_dtype(settings.dtype, config)
    if weight_format is None and settings.head_dtype != "auto":
        raise PartInferError(
            f"head_dtype {settings.head_dtype} belongs to quantised weights: give --dtype int4 with it"
        )
    if settings.memory_limit and device.type == "cpu":
        raise PartInferError("memory_limit moves active neurons to a GPU, but there is none: leave it out")

    model = build_on_meta(config, dtype)
    state = RequestState()
    native = native_kernels_wanted(settings.kernels, device, dtype)
    native &= weight_format is None or weight_format.native is not None
    sources = swap_ffns(
        model, family, plan, settings, state, dtype, weight_format, native=native, neurons=base, fit=fit
    )
    if weight_format is not None:
        head_format = FORMATS[HEAD_DTYPE if settings.head_dtype == "auto" else settings.head_dtype]
        in_planes = native and settings.screen_head != "off" and head_format.splits
        in_planes &= can_be_screened(model.get_output_embeddings())
        quantize_modules(model, weight_format, head_format, dtype, native=native, head_in_planes=in_planes)
    memory = WeightMemory(huge_pages=native)
    _stream_weights(
        model,
        weights,
        names,
        sources,
        device,
        known_inputs=None if weight_format is None else base,
        intermediate_size=plan.intermediate_size,
        keep_on_cpu=settings.memory_limit,
        memory=memory,
    )
    give_back_freed()
    attach_compensation(state.layers, plan, settings, sources, fit, device, dtype)
    state.attach(model)
    if native:
        replace_linears(model)
        screen_head(model, float_too=settings.screen_head == "on", memory=memory)
        speed_up_one_token(model)
    report = LoadReport(
        seconds=time.perf_counter() - started,
        bytes_read=weights.bytes_read + fit_bytes,
        bytes_dense=weights.total_bytes(),
        bytes_resident=weight_bytes(model),
    )
    return LoadedModel(model, settings, plan, state, report)


def _resolve_dtype(name: str, config: PretrainedConfig) -> tuple[torch.dtype, WeightFormat | None]:
    """The type of arithmetic and of what is not quantised, and the format of what is (None: nothing)."""
    if name in FORMATS:
        return torch.bfloat16, FORMATS[name]
    return ((config.dtype or torch.float32) if name == "auto" else getattr(torch, name)), None


def _check_files(
    config: PretrainedConfig,
    weights: WeightSource,
    names: dict[str, str],
    model_name: str,
    neuron_files: tuple[NeuronFile | None, ...],
    fit: FitFile | None,
) -> None:
    """Raise PartInferError unless the files that are given belong to the model."""

    def read(name: str) -> torch.Tensor:
        stored = names[name]
        values = torch.empty(weights.shape(stored))
        weights.read_into(stored, values)
        return values

    given = [file for file in neuron_files if file is not None]
    if not given and fit is None:
        return
    ours = fingerprint(config, read)
    for file in given:
        file.check_fits(config, ours, model_name)
    if fit is not None:
        fit.check_fits(config.num_hidden_layers, family_of(config).intermediate_size(config), ours, model_name)


def _names_in_model(weights: WeightSource) -> dict[str, str]:
    """Parameter name in the model -> name in the file. Files of a bare decoder lack the leading `model.`."""
    return {_with_prefix(name): name for name in weights.names()}


def _with_prefix(name: str) -> str:
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a config, its parameters without memory, its buffers real."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def _stream_weights(
    model: PreTrainedModel,
    weights: WeightSource,
    names: dict[str, str],
    sources: dict[str, Source],
    device: torch.device,
    *,
    known_inputs: NeuronFile | None,
    intermediate_size: int,
    keep_on_cpu: bool,
    memory: WeightMemory,
) -> None:
    """Give every parameter memory on its device, and read it. Nothing may be left over on either side.

    known_inputs: a neuron file, whose statistics quantising uses.
    """
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    head = "lm_head.weight" if not tied else model.all_tied_weights_keys["lm_head.weight"]
    important = column_weights(family_of(model.config), known_inputs, head)
    wanted: list[tuple[str, nn.Parameter | QuantizedWeight, Source]] = []
    used = set()
    for name, place in weight_places(model):
        source = sources.get(name, Source(name))
        stored = names.get(source.name)
        if stored is None:
            if name in tied:
                continue
            raise PartInferError(f"{weights.source} lacks {source.name}: the checkpoint is incomplete, fetch it again")
        used.add(source.name)
        if name not in tied:  # else the same tensor as its partner, which is read
            _check_shape(weights, stored, place.shape, source.how, intermediate_size)
            of_columns = important.get(source.name) if _has_weighted_errors(place, source) else None
            wanted.append((name, place, replace(source, name=stored, column_weights=of_columns)))
    ignored = [re.compile(p) for p in (r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ()))]
    unexpected = sorted(n for n in set(names) - used if not any(pattern.search(n) for pattern in ignored))
    if unexpected:
        raise PartInferError(f"{weights.source} has {unexpected[0]}, which {model.config.model_type} has no place for")

    def requests() -> Iterator[tuple[Source, torch.Tensor | QuantizedTensor]]:
        for name, place, source in wanted:
            on_cpu = device.type == "cpu" or (keep_on_cpu and name in sources and source.how != "whole")
            target = torch.device("cpu") if on_cpu else device
            pinned = target.type == "cpu" and device.type == "cuda"
            paired = target.type == "cpu" and not pinned and _is_paired(model, name)
            held = None
            if memory.huge_pages and target.type == "cpu":
                like = place.packed if isinstance(place, QuantizedWeight) else place
                held = weights.mapped(source, like, paired=paired)
            if held is None:
                held = _memory_for(name, place, memory, target, paired=paired, pinned=pinned)
            _hold(model, name, place, held)
            yield source, held

    weights.fill(requests())
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            continue  # where it was read to, and tied already
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if not isinstance(model.get_input_embeddings(), QuantizedEmbedding):
        model.tie_weights()
    left = [name for name, place in weight_places(model) if place.device.type == "meta"]
    if left:
        raise PartInferError(
            f"{weights.source}: {left[0]} was not loaded: the checkpoint is incomplete, fetch it again"
        )


def _has_weighted_errors(place: nn.Parameter | QuantizedWeight, source: Source) -> bool:
    """Whether columns of a weight are inputs. Columns that become rows are outputs."""
    return isinstance(place, QuantizedWeight) and source.how != "columns"


def _is_paired(model: PreTrainedModel, name: str) -> bool:
    """Whether rows of a weight take turns in memory with another's."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    return isinstance(module, NeuronRows) and leaf in module.paired_names


def _memory_for(
    name: str,
    place: nn.Parameter | QuantizedWeight,
    memory: WeightMemory,
    device: torch.device,
    *,
    paired: bool,
    pinned: bool,
) -> torch.Tensor | QuantizedTensor:
    """Memory for a weight, still to be filled. paired: beside its module's other one that is."""

    def empty(like: torch.Tensor) -> torch.Tensor:
        if paired:
            return memory.empty_paired((name.rpartition(".")[0], like.dtype), like.shape, like.dtype)
        return memory.empty(like.shape, like.dtype, device)

    values = place.packed.like(empty) if isinstance(place, QuantizedWeight) else empty(place)
    return values.pin_memory() if pinned else values


def _hold(
    model: PreTrainedModel, name: str, place: nn.Parameter | QuantizedWeight, values: torch.Tensor | QuantizedTensor
) -> None:
    """Make a weight this one from now on."""
    if isinstance(place, QuantizedWeight):
        place.fill(values)
        return
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))


def _check_shape(
    weights: WeightSource, stored: str, expected: tuple[int, ...], how: str, intermediate_size: int
) -> None:
    """Rows and columns were chosen by the config; a file of another size must not be read with them."""
    expected = tuple(expected)
    if how == "rows":
        expected = (intermediate_size, *expected[1:])
    elif how == "columns":
        expected = (expected[1], intermediate_size)
    shape = weights.shape(stored)
    if shape != expected:
        raise PartInferError(f"{weights.source}: {stored} has shape {shape}, its config.json says {expected}")
