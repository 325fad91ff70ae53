"""load_model(): resolve the run, build its model without memory, stream the planned weights in."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from transformers_patches.config import PartInferConfig
from transformers_patches.families import family_of
from transformers_patches.fast_pass.one_token import speed_up_one_token
from transformers_patches.fast_pass.recorded_pass import record_steps
from transformers_patches.load.as_stored import as_stored, names_in_model
from transformers_patches.load.ffn_swap import attach_compensation
from transformers_patches.load.generation_config import own_generation_config
from transformers_patches.load.input_swap import choose_inputs
from transformers_patches.load.loaded_model import LoadedModel, LoadReport
from transformers_patches.load.memory_plan import in_format_that_fits, within_memory
from transformers_patches.load.meta_model import build_model
from transformers_patches.load.streaming import KeptOnDisk, Progress, stream_weights
from transformers_patches.load.threads import check_threads
from transformers_patches.modules.fast_linear import replace_linears
from transformers_patches.modules.quantized import weight_bytes
from transformers_patches.modules.screened_head import screen_head
from transformers_patches.neurons.fingerprint import fingerprint
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.resolve import RunFiles
from transformers_patches.plan.run import ResolvedRun, resolve_run
from transformers_patches.sparse.request import RequestState
from transformers_patches.weights.lookup import model_name
from transformers_patches.weights.memory import WeightMemory, give_back_freed
from transformers_patches.weights.model_files import open_weights, read_config
from transformers_patches.weights.pack import Pack
from transformers_patches.weights.source import WeightSource


def load_model(
    folder: str | Path,
    settings: PartInferConfig,
    dataset_neurons: NeuronFile | None = None,
    model_neurons: NeuronFile | None = None,
    *,
    progress: Progress = iter,
) -> LoadedModel:
    """Load a checkpoint folder, pack or GGUF file: the planned neurons of sparse layers, and everything else whole.

    Neuron files that are not given are read from the paths in the settings, if there are any. Raises PartInferError
    for checkpoints and neuron files that are damaged or do not fit each other, before weights are read.

    progress: iterates over the weights while they are read, and may show how far that is.
    """
    weights, config, settings, files = _opened(folder, settings, dataset_neurons, model_neurons)
    loaded = load_from(weights, config, settings, files, model_name(folder), progress=progress)
    made = loaded.model.generation_config
    loaded.model.generation_config, loaded.stop_strings = own_generation_config(Path(folder), made, config.vocab_size)
    return loaded


def _opened(
    folder: str | Path,
    settings: PartInferConfig,
    dataset_neurons: NeuronFile | None = None,
    model_neurons: NeuronFile | None = None,
) -> tuple[WeightSource, PretrainedConfig, PartInferConfig, RunFiles]:
    """What a model is loaded from."""
    config = read_config(folder)
    family_of(config)  # an unknown architecture is the first thing to say
    files = RunFiles.of(settings, dataset_neurons, model_neurons)
    weights = open_weights(folder)
    if isinstance(weights, Pack):
        settings = weights.with_own_neurons(weights.with_own_type(settings))
        if not files.neurons:
            files = RunFiles.of(settings, **weights.neuron_files())
    return weights, config, settings, files


def resolve_files(folder: str | Path, settings: PartInferConfig) -> tuple[ResolvedRun, WeightSource]:
    """What `load_model` would decide for a checkpoint folder, pack or GGUF file, and where it would read weights from."""
    weights, config, settings, files = _opened(folder, settings)
    return _resolved(weights, as_stored(config, weights), settings, files, packed=False), weights


def load_from(
    weights: WeightSource,
    config: PretrainedConfig,
    settings: PartInferConfig,
    files: RunFiles,
    name: str,
    *,
    packed: bool = False,
    progress: Progress = iter,
) -> LoadedModel:
    """`load_model` for any source of weights. name: the model's, for messages. packed: what is loaded becomes a pack."""
    started = time.perf_counter()
    config = as_stored(config, weights)
    _check_files(files, config, weights, name)
    return load_run(_resolved(weights, config, settings, files, packed=packed), weights, started, progress)


def _resolved(
    weights: WeightSource, config: PretrainedConfig, settings: PartInferConfig, files: RunFiles, *, packed: bool
) -> ResolvedRun:
    is_pack = isinstance(weights, Pack)
    whole = is_pack and weights.holds_all_neurons

    def resolve(settings: PartInferConfig) -> ResolvedRun:
        return resolve_run(settings, config, files, packed=packed or is_pack, whole_pack=whole)

    return in_format_that_fits(resolve, settings, weights)


def load_run(run: ResolvedRun, weights: WeightSource, started: float, progress: Progress = iter) -> LoadedModel:
    """Load what was decided. started: when loading began, by `time.perf_counter`."""
    check_threads(run.device, run.dtype)
    run = within_memory(run, weights)
    fit_bytes = run.fit_bytes  # counted now, because rows are freed as they are read
    state, memory = RequestState(), WeightMemory(huge_pages=run.native)
    model, sources = build_model(run, state)
    kept = stream_weights(model, weights, sources, run, memory, progress)
    give_back_freed()
    _know_type(model, run)
    attach_compensation(state.layers, sources, run)
    state.attach(model)
    state.check_weights = partial(_check_weights, weights, kept)
    if run.layer_choices is not None:
        choose_inputs(model, state, run.family, run.layer_choices)
    if run.native:
        replace_linears(model)
        if run.screened:
            screen_head(model, memory)
        speed_up_one_token(model)
    elif run.by_kernels and run.layer_choices is None and not run.settings.memory_limit:
        record_steps(model, state)
    report = LoadReport(
        seconds=time.perf_counter() - started,
        bytes_read=weights.bytes_read + fit_bytes,
        bytes_dense=weights.total_bytes(),
        bytes_resident=weight_bytes(model) - kept.nbytes,
        bytes_in_file=kept.nbytes,
    )
    return LoadedModel(model, run.without_files(), state, report, rows_on_disk=kept.on_demand.rows)


def _know_type(model: PreTrainedModel, run: ResolvedRun) -> None:
    """transformers takes a model's type and device from its parameters; nanochat, quantised, has none left."""
    if next(model.parameters(), None) is None:
        empty = torch.empty(0, dtype=run.dtype, device=run.device)
        model.register_parameter("of_type", torch.nn.Parameter(empty, requires_grad=False))


def _check_weights(weights: WeightSource, kept: KeptOnDisk) -> None:
    """Raise PartInferError if a file of weights in use was changed. Drops what the last prompt read by row."""
    if isinstance(weights, Pack):
        weights.check_unchanged()
    kept.check_unchanged()
    kept.by_row.give_back()


def _check_files(files: RunFiles, config: PretrainedConfig, weights: WeightSource, name: str) -> None:
    """Raise PartInferError unless the files that are given belong to the model. name: the model's."""
    if not files.neurons and files.fit is None:
        return
    names = names_in_model(weights, config)

    def read(parameter: str) -> torch.Tensor:
        stored = names[parameter]
        values = torch.empty(weights.shape(stored))
        weights.read_into(stored, values)
        return values

    ours = fingerprint(config, read)
    for file in files.neurons:
        file.check_fits(config, ours, name)
    if files.fit is not None:
        files.fit.check_fits(config, ours, name)
