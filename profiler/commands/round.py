"""`round`: model and texts -> rounding file, values of few bits that change the layers' outputs least."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from profiler.arguments import add_model_arguments, add_overwrite, add_text_arguments, positive, text_source
from profiler.expected_loss import chosen_texts
from profiler.layerwise import LayerwiseModel, make_batches
from profiler.placement import load_named
from profiler.rounding.run import RoundingRun
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError
from transformers_patches.kernels.formats import FORMATS, INT4, format_named
from transformers_patches.locks import exclusive
from transformers_patches.weights.rounding import Rounding

HELP = "round weights to 8 or 4 bits by what that does to the layers' outputs on texts, for packs"
TOKENS = 8192
EXAMPLES = """examples:
  python -m profiler round --dataset builtin --task_type QA --chat_template --output models/demo.int4.safetensors
  python -m profiler round --dataset book.txt --task_type text --max_new_tokens 0 --output models/demo.int4.safetensors
then: python partinfer.py --function pack --dtype int4 --rounding models/demo.int4.safetensors --output models/demo-int4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_arguments(parser)
    add_model_arguments(parser)
    what = parser.add_argument_group("rounding")
    what.add_argument("--to", choices=tuple(FORMATS), default=INT4.name, help=f"the format of the values ({INT4.name})")
    text = f"tokens of texts at most: more take longer and round better ({TOKENS})"
    what.add_argument("--tokens", type=positive, default=TOKENS, metavar="N", help=text)
    what.add_argument("--output", type=Path, required=True, metavar="FILE", help="the rounding file, .safetensors")
    add_overwrite(what)
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_config(parser)


def main(arguments: argparse.Namespace) -> None:
    source, output = text_source(arguments), arguments.output
    if output.suffix != ".safetensors":
        raise PartInferError(f"--output must end in .safetensors, got {output}")
    with exclusive(output):
        if output.exists() and not arguments.overwrite:
            raise PartInferError(f"{output} is there already: add --overwrite, or give another --output")
        loaded = load_named(arguments)
        if loaded.model.device.type != "cpu":
            raise PartInferError("rounding computes on the CPU: add --device cpu")
        texts = _texts(chosen_texts(arguments, source, loaded), arguments.tokens)
        batches = make_batches(texts, [0] * len(texts), arguments.batch_size)
        weight_format = format_named(arguments.to)
        weights = RoundingRun(LayerwiseModel(loaded.model), batches, weight_format).run(quiet=arguments.quiet)
        tokens = sum(map(len, texts))
        named = f"{len(texts)} texts, {tokens} tokens of {source.dataset}"
        Rounding(weight_format, loaded.fingerprint, weights, named).save(output)
    size = sum(weight.nbytes for weight in weights.values())
    content = {"output": str(output), "weights": len(weights), "bytes": size, "texts": len(texts), "tokens": tokens}
    text = f"{output}: {len(weights)} weights in {arguments.to}, {size / 1e6:.0f} MB, rounded for {named}"
    cli.report(arguments.json, content, text)


def _texts(chosen, tokens: int) -> list[list[int]]:
    """The first texts, up to so many tokens together."""
    texts: list[list[int]] = []
    for ids, _ in chosen:
        ids = list(islice(ids, tokens - sum(map(len, texts))))
        if ids:
            texts.append(ids)
        if sum(map(len, texts)) >= tokens:
            break
    if not texts:
        raise PartInferError("there are no texts: check --dataset, --skip and --limit")
    return texts
