"""`cluster`: groups of similar texts and their core neurons, added to a neuron file for --selection similarity."""

from __future__ import annotations

import argparse
from pathlib import Path

from profiler.arguments import add_model_arguments, add_text_arguments, positive, text_source
from profiler.clustering import make_clusters
from profiler.expected_loss import chosen_texts
from profiler.placement import load_named
from profiler.store import interrupts_deferred
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.neuron_file import NeuronFile

HELP = "group similar texts, and add the core neurons of each group to a neuron file (--selection similarity)"
EXAMPLES = """examples:
  python -m profiler cluster my_qa.safetensors --dataset builtin --task_type QA --clusters 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="the model's neuron file, .safetensors, which gets the clusters")
    parser.add_argument("--clusters", type=positive, default=8, metavar="N", help="groups of texts, at most (8)")
    add_text_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(max_new_tokens=0)
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_config(parser)


def main(arguments: argparse.Namespace) -> None:
    if arguments.file.suffix == ".json":
        raise PartInferError(
            f"{arguments.file} is a ranking in the original's format, which holds no clusters: profile again"
        )
    neurons, source = NeuronFile.load(arguments.file), text_source(arguments)
    neurons.check_ffns()
    loaded = load_named(arguments)
    neurons.check_fits(loaded.model.config, None, str(arguments.checkpoint_path))
    texts = [ids for ids, _ in chosen_texts(arguments, source, loaded)]
    neurons.clusters, sizes = make_clusters(
        loaded.model, neurons, texts, arguments.clusters, seed=arguments.seed, quiet=arguments.quiet
    )
    with interrupts_deferred():
        neurons.save(arguments.file)
    content = {"output": str(arguments.file), "texts": len(texts), "clusters": sizes}
    listed = ", ".join(map(str, sizes))
    cli.report(arguments.json, content, f"{arguments.file}: {len(sizes)} clusters of {listed} texts")
