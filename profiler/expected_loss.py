"""What users of a neuron file may expect: its loss curve and byte ladder, from the texts that a command's arguments name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

import torch

from profiler.arguments import count
from profiler.collect import with_continuations
from profiler.ladder.build import make_ladder
from profiler.ladder.measurement import measured
from profiler.loss_measurement import SCORED_TOKENS, LossMeasurement, ScoredText, scored_texts
from profiler.model_texts import text_sequences
from profiler.placement import ProfiledModel
from profiler.texts import ResolvedSource
from transformers_patches import cli
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.byte_ladder import ByteLadder
from transformers_patches.neurons.loss_curve import LossCurve
from transformers_patches.neurons.neuron_file import NeuronFile

_BOUNDS = (0.02, 0.05, 0.1)  # on the loss, for which the tables say what is read


def add_loss_tokens(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    text = (
        f"tokens over which losses are averaged: more take longer but measure more precisely; 0: none ({SCORED_TOKENS})"
    )
    parser.add_argument("--loss_tokens", type=count, default=SCORED_TOKENS, metavar="N", help=text)


def texts_to_score(arguments: argparse.Namespace, source: ResolvedSource, loaded: ProfiledModel) -> list[ScoredText]:
    """The first texts of the source, with the model's greedy continuation unless --max_new_tokens is 0."""
    return scored_texts(chosen_texts(arguments, source, loaded), arguments.loss_tokens)


def chosen_texts(
    arguments: argparse.Namespace, source: ResolvedSource, loaded: ProfiledModel
) -> Iterator[tuple[list[int], int]]:
    """Token ids of the texts that --skip and --limit leave, continued, and how many of them are the prompt."""
    sequences = islice(text_sequences(arguments, source, loaded), arguments.skip, None)
    if arguments.limit is not None:
        sequences = islice(sequences, arguments.limit)
    return _continued(sequences, arguments, loaded)


def _continued(
    sequences: Iterator[list[int]], arguments: argparse.Namespace, loaded: ProfiledModel
) -> Iterator[tuple[list[int], int]]:
    """Each sequence with the model's continuation, and how many of its ids are the prompt."""
    while batch := [ids for ids in islice(sequences, arguments.batch_size) if ids]:
        longer = batch
        if arguments.max_new_tokens:
            with torch.no_grad():
                longer = with_continuations(loaded.model, batch, arguments.max_new_tokens)
        yield from zip(longer, map(len, batch), strict=True)


def measure(arguments: argparse.Namespace, neurons: NeuronFile, texts: list[ScoredText]) -> LossCurve:
    """The loss curve of a model's neuron file. arguments: --checkpoint_path, --dtype, --device and --quiet."""
    settings = {"dtype": arguments.dtype, "device": arguments.device}
    return LossMeasurement(arguments.checkpoint_path, settings, neurons, texts).curve(quiet=arguments.quiet)


def ladder_of(arguments: argparse.Namespace, loaded: ProfiledModel, texts: list[ScoredText]) -> ByteLadder | None:
    """The byte ladder of a model, with predicted losses; None, and a note that says why, if it can't have one."""
    try:
        return make_ladder(loaded.model, [text.prompt + text.target for text in texts], quiet=arguments.quiet)
    except PartInferError as error:  # what else was found out is worth keeping
        if not arguments.quiet:
            print(error, file=sys.stderr)
        return None


def measure_ladder(
    arguments: argparse.Namespace,
    neurons: NeuronFile,
    texts: list[ScoredText],
) -> ByteLadder | None:
    """The byte ladder of a model's neuron file with measured losses; None if the file has no ladder."""
    if neurons.ladder is None:
        return None
    settings = {"dtype": arguments.dtype, "device": arguments.device}
    return measured(neurons, arguments.checkpoint_path, settings, texts, quiet=arguments.quiet)


def losses(neurons: NeuronFile) -> dict[str, list[dict]]:
    """What was measured, for --json: the points of the curve, and the rungs of the ladder, if there are some."""
    rungs = [] if neurons.ladder is None else neurons.ladder.rungs
    return {"losses": [asdict(point) for point in neurons.loss.points], "ladder": [asdict(rung) for rung in rungs]}


def expectation(curve: LossCurve, ladder: ByteLadder | None = None) -> str:
    """What users of the file may expect, as a table; with a ladder, two."""
    tables = [_of_curve(curve)] if ladder is None else [_of_ladder(ladder), _of_curve(curve)]
    return "\n\n".join(tables)


def _of_ladder(ladder: ByteLadder) -> str:
    lines = [["bytes of all decoder layers a token reads", "loss, nats per token", "NLL", "KL"]]
    for rung in ladder.rungs:
        loss = ladder.predict(rung.block_bytes)
        lines.append([f"{rung.block_bytes:.1%}", f"{loss:.3f}", f"{rung.nll:.3f}", f"{rung.kl:.3f}"])
    bounds = ", ".join(f"{bound:g}: {ladder.bytes_for(bound):.0%}" for bound in _BOUNDS)
    return f"{cli.aligned(lines)}\nbytes of all decoder layers read at --max_loss {bounds}"


def _of_curve(curve: LossCurve) -> str:
    rows = [("everything loaded, all layers", p) for p in curve.whole]
    rows += [
        ("documented fractions", p) for p in curve.points if (p.selection, p.sparsity) == ("up", 0.4) and p.loaded < 1
    ]
    rows += [("the original's method", p) for p in curve.points if p.selection == "core"]
    lines = [["setting", "loaded", "FFN bytes a token reads", "loss, nats per token"]]
    lines += [[name, f"{p.loaded:.0%}", f"{p.sparsity:.0%}", f"{p.loss:.3f}"] for name, p in rows]
    bounds = ", ".join(f"{bound:g}: {curve.sparsity_for(bound):.0%}" for bound in _BOUNDS)
    return f"{cli.aligned(lines)}\nFFN bytes read at --max_loss {bounds}, where only FFNs are sparse"
