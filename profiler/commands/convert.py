"""`convert`: the original's JSON to the project's format and back."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from profiler.arguments import add_overwrite
from profiler.placement import checkpoint_fingerprint
from profiler.store import new_output
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.weights.lookup import model_name

HELP = "convert a neuron file between the original's JSON and the project's format, by the names' endings"
EXAMPLES = """examples:
  python -m profiler convert qa.json qa.safetensors --checkpoint_path models/Llama-3.2-3B
  python -m profiler convert qa.safetensors qa.json

JSON holds the ranking only: scores, statistics and where they came from are lost on the way to it.
"""
ENDINGS = (".json", ".safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="neuron file, .json or .safetensors")
    parser.add_argument("output", type=Path, help="neuron file, .json or .safetensors")
    model = flags.add_model(parser, default=None)
    model.description = "if given: check that the file fits it, and note it in the output"
    add_overwrite(parser)
    flags.add_json(parser)
    flags.add_config(parser)


def main(arguments: argparse.Namespace) -> None:
    if arguments.output.suffix not in ENDINGS:
        raise PartInferError(f"{arguments.output}: expected a name that ends in {' or '.join(ENDINGS)}")
    with new_output(arguments.output, overwrite=arguments.overwrite):
        file = NeuronFile.load(arguments.input)
        if arguments.checkpoint_path:
            config, fingerprint = checkpoint_fingerprint(arguments.checkpoint_path)
            name = model_name(arguments.checkpoint_path)
            file.check_fits(config, fingerprint, name)
            model = {"model_name": name, "model_type": config.model_type, "fingerprint": fingerprint}
            file = replace(file, metadata={**file.metadata, **model})
        file.save(arguments.output)
    shape = {"layers": file.num_layers, "intermediate_size": file.intermediate_size}
    text = f"{arguments.output}: {file.num_layers} layers of {file.intermediate_size} neurons"
    cli.report(arguments.json, {"output": str(arguments.output), **shape}, text)
