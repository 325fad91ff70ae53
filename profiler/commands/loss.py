"""`loss`: what decoding with fewer bytes costs, measured on texts and added to a neuron file."""

from __future__ import annotations

import argparse
from pathlib import Path

from profiler.arguments import add_model_arguments, add_text_arguments, text_source
from profiler.expected_loss import (
    add_loss_tokens,
    expectation,
    ladder_of,
    losses,
    measure,
    measure_ladder,
    texts_to_score,
)
from profiler.placement import load_named
from profiler.store import interrupts_deferred
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.neuron_file import NeuronFile

HELP = "measure what decoding with fewer bytes costs, and add it to a neuron file"
EXAMPLES = """examples:
  python -m profiler loss my_qa.safetensors --dataset builtin --task_type QA --max_new_tokens 64
  python -m profiler loss book.safetensors --dataset book.txt --task_type text --max_new_tokens 0 --loss_tokens 4096
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="the model's neuron file, .safetensors, which gets the curve")
    add_text_arguments(parser)
    add_model_arguments(parser)
    add_loss_tokens(parser)
    text = "make the byte ladder as well, which partinfer.py --block_bytes needs: takes several times as long"
    parser.add_argument("--ladder", action="store_true", help=text)
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_config(parser)


def main(arguments: argparse.Namespace) -> None:
    if arguments.file.suffix == ".json":
        raise PartInferError(
            f"{arguments.file} is a ranking in the original's format, which holds no losses: profile again"
        )
    neurons, source = NeuronFile.load(arguments.file), text_source(arguments)
    neurons.check_ffns()
    loaded = load_named(arguments)
    texts = texts_to_score(arguments, source, loaded)
    if not texts:
        raise PartInferError("no text is long enough to measure losses on: two tokens of a prompt, and one to score")
    if arguments.ladder:
        neurons.ladder = ladder_of(arguments, loaded, texts)
        _save(neurons, arguments.file)  # with predicted losses, should measuring them be interrupted
    del loaded
    neurons.loss = measure(arguments, neurons, texts)
    if arguments.ladder:
        neurons.ladder = measure_ladder(arguments, neurons, texts)
    _save(neurons, arguments.file)
    content = {"output": str(arguments.file), **losses(neurons)}
    cli.report(arguments.json, content, expectation(neurons.loss, neurons.ladder))


def _save(neurons: NeuronFile, file: Path) -> None:
    with interrupts_deferred():
        neurons.save(file)
