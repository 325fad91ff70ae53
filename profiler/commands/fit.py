"""`fit`: neuron file and texts -> fit file, what stands in for the neurons that are left out."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from profiler.arguments import (
    add_model_arguments,
    add_output_arguments,
    add_text_arguments,
    count,
    fraction,
    text_source,
)
from profiler.budget import Share, spread_budget
from profiler.commands.run import default_output, profiled_settings
from profiler.fit_run import FitCheckpoint, FitRun, prepare_texts
from profiler.fitting import FitSettings
from profiler.layerwise import Batch, LayerwiseModel
from profiler.model_texts import text_sequences
from profiler.placement import ProfiledModel, load_named
from profiler.ranking import SCORES, score_neurons
from profiler.store import interrupts_deferred
from profiler.texts import SELF, ResolvedSource
from transformers_patches import cli, flags
from transformers_patches.config import BUDGETS, TOKEN_SELECTIONS, PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.locks import exclusive
from transformers_patches.neurons.fit_file import FitFile, fit_path
from transformers_patches.neurons.neuron_file import NeuronFile, ranking_from_scores

HELP = "fit what stands in for the neurons that are left out, by least squares over texts"
EXAMPLES = """examples:
  python -m profiler fit --dataset builtin --task_type QA --max_new_tokens 32
  python -m profiler fit --neurons my_qa.safetensors --dataset questions.jsonl --task_type QA --limit 500
  python -m profiler fit --neurons book.safetensors --dataset book.txt --task_type text --max_new_tokens 0
  python -m profiler fit --dataset builtin --task_type QA --loaded_neurons_percent 0.5 --choose std_down
"""
BEST, RANKING = "best", "ranking"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser)
    add_text_arguments(parser)
    add_model_arguments(parser)
    fit = parser.add_argument_group("fit")
    fit.add_argument(
        "--neurons", type=Path, help="the neuron file it belongs to (neuron_files/<model>/<task>.safetensors)"
    )
    fit.add_argument("--loaded_neurons_percent", type=fraction, default=0.7, help="gamma that it is for (0.7)")
    fit.add_argument("--sparsity", type=fraction, default=0.4, help="phi that it is for, of the FFN bytes (0.4)")
    fit.add_argument("--start_num", type=count, help="first sparse layer (3)")
    fit.add_argument("--end_num", type=count, help="last sparse layer (the third from the end)")
    fit.add_argument(
        "--down_rank",
        type=count,
        default=0,
        help="store what the refit adds as a product of this rank: a smaller file (0: whole rows)",
    )
    fit.add_argument(
        "--selection",
        choices=(*TOKEN_SELECTIONS, "none"),
        default="up",
        help="what chooses neurons in decoding; none: all that are loaded are computed (up)",
    )
    fit.add_argument(
        "--choose",
        choices=(BEST, RANKING, *SCORES),
        default=BEST,
        help=f"which neurons are loaded; {BEST}: those whose refitted rows leave the smallest error; {RANKING}: the "
        f"first of the neuron file's ranking; or by a score of its statistics ({BEST})",
    )
    fit.add_argument(
        "--budget",
        choices=BUDGETS[1:],
        default="uniform",
        help="the same gamma and phi for every sparse layer, or, for the same bytes in all, those of each layer that cost "
        "least by an estimate, over all layers of the model (uniform)",
    )
    fit.add_argument("--ridge", type=float, default=0.03, help="pull towards the original rows (0.03)")
    add_output_arguments(
        parser,
        "fit file (beside the neuron file, <name>.fit.safetensors)",
        resume="go on after the last layer of an interrupted fit",
    )


def main(arguments: argparse.Namespace) -> None:
    source = text_source(arguments)
    path = arguments.neurons or default_output(arguments.checkpoint_path, source.task_type)
    neurons = NeuronFile.load(path)
    neurons.check_ffns()
    output = arguments.output or fit_path(path)
    settings = _fit_settings(arguments)
    if arguments.quiet:
        transformers_logging.disable_progress_bar()
    with exclusive(output):
        checkpoint = FitCheckpoint(output)
        if arguments.resume and output.exists() and not checkpoint.exists():
            fit = FitFile.load(output)  # nothing is left to do
        else:
            resumes = checkpoint.begin(resume=arguments.resume, overwrite=arguments.overwrite)
            fit = _fit(arguments, source, neurons, settings, output, resume=resumes)
        _report(arguments, fit, output)


def _fit_settings(arguments: argparse.Namespace) -> FitSettings:
    if arguments.sparsity > arguments.loaded_neurons_percent:
        raise PartInferError(
            f"--sparsity must be at most --loaded_neurons_percent, got {arguments.sparsity:g} > "
            f"{arguments.loaded_neurons_percent:g}"
        )
    if arguments.ridge < 0:
        raise PartInferError(f"--ridge must not be negative, got {arguments.ridge:g}")
    return FitSettings(
        loaded=arguments.loaded_neurons_percent,
        sparsity=arguments.sparsity,
        down_rank=arguments.down_rank,
        token_selection=None if arguments.selection == "none" else arguments.selection,
        ridge=arguments.ridge,
    )


def _fit(
    arguments: argparse.Namespace,
    source: ResolvedSource,
    neurons: NeuronFile,
    fit_settings: FitSettings,
    output: Path,
    *,
    resume: bool,
) -> FitFile:
    loaded = _load(arguments)
    model = loaded.model
    identity = profiled_settings(arguments, source, loaded)
    neurons.check_fits(model.config, identity["fingerprint"], loaded.name)
    layers = PartInferConfig(start_num=arguments.start_num, end_num=arguments.end_num).resolve_layers(
        model.config.num_hidden_layers
    )
    texts = prepare_texts(
        model,
        text_sequences(arguments, source, loaded),
        skip=arguments.skip,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        new_tokens=0 if source.dataset == SELF else arguments.max_new_tokens,
        quiet=arguments.quiet,
    )
    run = FitRun(
        model=model,
        texts=texts,
        layers=_shares(arguments.budget, model, texts.batches, layers, fit_settings),
        fit_settings=fit_settings,
        ranking=_ranking(arguments.choose, neurons),
        checkpoint=FitCheckpoint(output),
        settings={
            **identity,
            **_named(fit_settings),
            "choose": arguments.choose,
            "start_num": layers[0],
            "end_num": layers[-1],
            "budget": arguments.budget,
            "texts_sha256": texts.digest,
        },
        quiet=arguments.quiet,
    )
    fit = run.run(resume=resume)
    fit.metadata = _metadata(run)
    with interrupts_deferred():
        fit.save(output)
        run.checkpoint.remove()
    return fit


def _load(arguments: argparse.Namespace) -> ProfiledModel:
    loaded = load_named(arguments)
    if any(parameter.is_meta for parameter in loaded.model.parameters()):
        raise PartInferError("the model does not fit on the GPUs: use --device cpu")
    return loaded


def _shares(
    budget: str, model: PreTrainedModel, batches: list[Batch], layers: range, settings: FitSettings
) -> dict[int, Share | None]:
    """The sparse layers, each with its share (None: that of the settings)."""
    if budget == "uniform":
        return dict.fromkeys(layers)
    shares = _spread(model, batches, layers, settings)
    if not shares:
        raise PartInferError("nothing would be left out: lower --loaded_neurons_percent or --sparsity")
    return shares


def _metadata(run: FitRun) -> dict[str, str]:
    """What the fit file says of how it was made, and how well it fits."""
    metadata = {name: str(value) for name, value in run.settings.items() if value is not None} | {
        "texts": str(run.texts.texts),
        "tokens": str(run.texts.tokens),
        "error_before": f"{_mean(run.errors, 0):.4f}",
        "error_after": f"{_mean(run.errors, 1):.4f}",
    }
    if run.settings["budget"] == "per_layer":
        metadata["layer_sparsity"] = json.dumps({layer: share.sparsity for layer, share in run.layers.items()})
    return metadata


def _spread(
    model: PreTrainedModel, batches: list[Batch], layers: range, settings: FitSettings
) -> dict[int, Share | None]:
    """A share for every layer of the model, for the bytes that the uniform share on `layers` would take."""
    count = model.config.num_hidden_layers
    whole = count - len(layers)
    return spread_budget(
        LayerwiseModel(model),
        batches,
        whole + len(layers) * settings.loaded,
        whole + len(layers) * settings.sparsity,
        settings.share,
    )


def _named(settings: FitSettings) -> dict:
    """The settings under the names of the fit file's metadata."""
    values = asdict(settings)
    values["loaded_neurons_percent"] = values.pop("loaded")
    values["compensation"] = "refit"
    values["selection"] = values.pop("token_selection") or "none"
    return values


def _ranking(choose: str, neurons: NeuronFile) -> torch.Tensor | None:
    if choose == BEST:
        return None
    if choose == RANKING:
        return neurons.ranking
    return ranking_from_scores(score_neurons(neurons.statistics, choose, neurons.source))


def _mean(errors: dict[int, tuple[float, float]], place: int) -> float:
    return sum(pair[place] for pair in errors.values()) / len(errors)


def _report(arguments: argparse.Namespace, fit: FitFile, output: Path) -> None:
    data = fit.metadata
    text = (
        f"{output}: {len(fit.layers)} layers fitted ({data['compensation']}) over {data['tokens']} tokens of "
        f"{data['texts']} texts, {output.stat().st_size / 2**20:.1f} MiB; mean squared output error "
        f"{data['error_before']} of the output's, now {data['error_after']}"
    )
    cli.report(arguments.json, {"output": os.fspath(output), "bytes": output.stat().st_size, **data}, text)
