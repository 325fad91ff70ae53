"""`run`: texts -> statistics -> neuron file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from profiler.arguments import (
    LARGE,
    TEXTS_OF_LARGE,
    add_model_arguments,
    add_output_arguments,
    add_text_arguments,
    positive,
    text_source,
)
from profiler.collect import Collector
from profiler.expected_loss import (
    add_loss_tokens,
    expectation,
    losses,
    measure,
    texts_to_score,
)
from profiler.experts import expert_neurons, few_tokens
from profiler.loss_measurement import ScoredText
from profiler.model_texts import own_texts, text_sequences
from profiler.placement import ProfiledModel, load_for_profiling
from profiler.processes import from_main
from profiler.profile import ProfilingRun
from profiler.ranking import SCORES, down_norms, rank
from profiler.sequences import Window, windows
from profiler.store import ProfileCheckpoint, Progress, check_output, interrupts_deferred
from profiler.texts import BUILTIN, SELF, ResolvedSource
from transformers_patches import cli, flags
from transformers_patches.locks import exclusive
from transformers_patches.neurons.lookup import own_neuron_file
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.weights.lookup import model_name

HELP = "profile a model on texts and write a neuron file"
EXAMPLES = """examples:
  python -m profiler run --dataset builtin --task_type QA --max_new_tokens 32 --output my_qa.safetensors
  python -m profiler run --dataset questions.jsonl --task_type QA --text_field question --limit 500
  python -m profiler run --dataset pairs.csv --template "Translate to English: {german}" --output own.safetensors
  python -m profiler run --dataset book.txt --task_type text --max_new_tokens 0
  python -m profiler run --dataset truthfulqa/truthful_qa --dataset_config generation
  python -m profiler run --dataset self --task_type QA --limit 200
  accelerate launch --num_processes 2 -m profiler run --dataset xsum --limit 1000 --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser)
    add_text_arguments(parser)
    add_model_arguments(parser)
    output = add_output_arguments(
        parser,
        "neuron file (neuron_files/<model>/<task>.safetensors)",
        resume="go on from the checkpoint of an interrupted run, if any",
    )
    output.add_argument("--score", choices=SCORES, default="mean_abs", help="what the ranking goes by (mean_abs)")
    add_loss_tokens(output)
    output.add_argument("--checkpoint_every", type=positive, default=256, help="texts between checkpoints (256)")


def main(arguments: argparse.Namespace) -> None:
    source = text_source(arguments)
    output = arguments.output or default_output(arguments.checkpoint_path, source.task_type)
    check_output(output)
    if arguments.quiet:
        transformers_logging.disable_progress_bar()
    # there is one process unless `accelerate launch` has started more
    processes = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    main_process = processes.is_main_process
    with exclusive(output) if main_process else nullcontext():
        # the others wait here, so that none begins what the main process refuses
        done = from_main(main_process and _already_done(arguments, output), processes)
        if not done:
            profile(arguments, source, output, processes)
        if main_process:
            _report(arguments, NeuronFile.load(output), output)


def default_output(checkpoint_path: Path, task_type: str) -> Path:
    """neuron_files/<model>/<task>.safetensors, where the runner looks."""
    return own_neuron_file(model_name(checkpoint_path), task_type.lower())


def _already_done(arguments: argparse.Namespace, output: Path) -> bool:
    """Whether --resume has nothing left to do; PartInferError if earlier work would be lost without being asked for."""
    checkpoint = ProfileCheckpoint(output)
    if arguments.resume and output.exists() and not checkpoint.exists():
        return True
    checkpoint.begin(resume=arguments.resume, overwrite=arguments.overwrite)
    return False


def profile(arguments: argparse.Namespace, source: ResolvedSource, output: Path, processes: PartialState) -> None:
    """Run the model over the texts; the main process measures losses and writes the neuron file."""
    counted = _count(arguments, source, output, processes)
    if counted is None:
        return
    neurons, texts = counted  # the model's memory is free by now: measuring loads it again
    if texts:
        neurons.loss = measure(arguments, neurons, texts)
    with interrupts_deferred():
        neurons.save(output)
        ProfileCheckpoint(output).remove()


def _count(
    arguments: argparse.Namespace, source: ResolvedSource, output: Path, processes: PartialState
) -> tuple[NeuronFile, list[ScoredText]] | None:
    """The ranked neurons, and the texts to measure losses on; None in all processes but the main one."""
    own = source.dataset == SELF
    prompt_tokens = 0 if own else arguments.max_length
    device = f"cuda:{processes.local_process_index}" if _shares_gpus(arguments, processes) else arguments.device
    loaded = load_for_profiling(
        arguments.checkpoint_path,
        device,
        arguments.dtype,
        arguments.batch_size,
        prompt_tokens + arguments.max_new_tokens,
        int(os.environ.get("LOCAL_WORLD_SIZE", processes.num_processes)),
    )
    arguments = argparse.Namespace(**vars(arguments) | {"limit": texts_to_take(arguments.limit, source, loaded.model)})
    collector = Collector.of(loaded.model, 0 if own else arguments.max_new_tokens)
    statistics = collector.statistics
    settings = profiled_settings(arguments, source, loaded) | {
        "checkpoint_every": arguments.checkpoint_every,
        "processes": processes.num_processes,
    }
    run = ProfilingRun(
        collector=collector,
        windows=_window_source(arguments, source, loaded, processes),
        batch_size=arguments.batch_size,
        checkpoint=ProfileCheckpoint(output),
        settings=settings,
        processes=processes,
        describe=loaded.tokenizer.decode,
        total=arguments.limit,
        quiet=arguments.quiet,
    )
    run.run(resume=_resumes(run, arguments))
    if not processes.is_main_process:
        return None
    counted = {"tokens": str(statistics.tokens), "texts": str(run.progress.texts)}
    named = {name: str(value) for name, value in settings.items() if value is not None}
    metadata = {**named, **counted, "datasets": "1", "texts_sha256": run.progress.digest}
    values = {**statistics.means(), "down_norm": down_norms(loaded.model)}
    squares, experts = statistics.input_squares(), expert_neurons(loaded.model, statistics)
    neurons = rank(values, arguments.score, metadata, input_squares=squares, experts=experts)
    if not neurons.intermediate_size:
        return neurons, []  # losses are measured of FFNs
    alone = processes.num_processes == 1 or source.dataset != SELF  # own texts are written by all processes together
    texts = texts_to_score(arguments, source, loaded) if alone and arguments.loss_tokens else []
    return neurons, texts


def texts_to_take(given: int | None, source: ResolvedSource, model: PreTrainedModel) -> int | None:
    """How many texts are profiled: what --limit says, else all. None: all.

    Of a large model fewer of the project's own texts do: it is then ready in minutes on a CPU, too.
    """
    if given is not None or source.dataset != BUILTIN or model.num_parameters() < LARGE:
        return given
    return TEXTS_OF_LARGE


def _shares_gpus(arguments: argparse.Namespace, processes: PartialState) -> bool:
    return processes.num_processes > 1 and processes.device.type == "cuda" and arguments.device in ("auto", "cuda")


def _resumes(run: ProfilingRun, arguments: argparse.Namespace) -> bool:
    return arguments.resume and run.checkpoint.exists()


def _window_source(
    arguments: argparse.Namespace, source: ResolvedSource, loaded: ProfiledModel, processes: PartialState
):
    """What gives the run its windows; their size is a multiple of the batch size."""
    size = -(-arguments.checkpoint_every // arguments.batch_size) * arguments.batch_size
    if source.dataset == SELF:
        own = own_texts(arguments, source, loaded, processes)

        def own_windows(done: Progress) -> Iterator[Window]:
            rest = own.sequences(done.windows * size)
            return windows(rest, size, limit=arguments.limit, done=done.windows, digest=done.digest)

        return own_windows

    def read_windows(done: Progress) -> Iterator[Window]:
        return windows(text_sequences(arguments, source, loaded), size, arguments.skip, arguments.limit)

    return read_windows


def profiled_settings(arguments: argparse.Namespace, source: ResolvedSource, loaded: ProfiledModel) -> dict:
    """Model and texts: what a resumed run must have in common, and the metadata of what comes out."""
    model = loaded.model
    return {
        "model_name": loaded.name,
        "model_type": model.config.model_type,
        "fingerprint": loaded.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "dataset": Path(source.dataset).name if Path(source.dataset).exists() else source.dataset,
        "dataset_config": source.config,
        "dataset_split": source.split,
        "task_type": source.task_type,
        "template": source.template.template,
        "fields": source.template.fields,
        "chat_template": arguments.chat_template,
        "skip": arguments.skip,
        "limit": arguments.limit,
        "max_length": arguments.max_length,
        "max_new_tokens": arguments.max_new_tokens,
        "seed": arguments.seed if source.dataset == SELF else None,
        "batch_size": arguments.batch_size,
    }


def _report(arguments: argparse.Namespace, neurons: NeuronFile, output: Path) -> None:
    data = neurons.metadata
    ranked = f"{neurons.num_layers} layers of {neurons.intermediate_size} neurons"
    if neurons.experts is not None:
        mixtures, count, size = neurons.experts.shape
        own = f"{mixtures} layers of {count} experts with {size} neurons"
        ranked = f"{ranked} and {own}" if neurons.intermediate_size else own
    text = (
        f"{output}: {ranked} ranked by {data['score']} "
        f"over {data['tokens']} tokens of {data['texts']} texts ({data['dataset']}, {data['task_type']})"
    )
    content = {"output": os.fspath(output), **data}
    if neurons.loss is not None:
        content |= losses(neurons)
        text = f"{expectation(neurons.loss)}\n\n{text}"
    if neurons.experts is not None and neurons.experts.unknown:
        text = f"{text}\n{few_tokens(neurons.experts)}"
        content["experts_with_few_tokens"] = neurons.experts.unknown
    cli.report(arguments.json, content, text)
