"""Arguments that several commands share: which texts, which model, and where the result goes."""

from __future__ import annotations

import argparse
from pathlib import Path

from profiler.templates import TASK_TYPES
from profiler.texts import BUILTIN, HUB_DATASETS, SELF, ResolvedSource, TextSource
from transformers_patches import flags
from transformers_patches.config import FLOAT_DTYPES
from transformers_patches.errors import PartInferError

TEXTS_OF_LARGE = 96  # that say enough about a large model, in minutes on a CPU
LARGE = 1_000_000_000  # weights


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--dataset",
        default=BUILTIN,
        help="a file: JSON lines, CSV, TSV, Parquet or plain text, also compressed with gzip; a folder that download.py "
        f"saved; a hub data set (mapped already: {', '.join(HUB_DATASETS)}); {BUILTIN}: texts that come with the project; "
        f"{SELF}: the model writes its own by sampling ({BUILTIN})",
    )
    texts.add_argument("--dataset_config", help="configuration of a hub data set")
    texts.add_argument("--dataset_split", help="split of a hub or saved data set (train, or as the mapping says)")
    texts.add_argument("--task_type", choices=TASK_TYPES, help="whose template is put around the texts (text: none)")
    texts.add_argument(
        "--text_field", help="the field of a record that is the text, such as question or translation.de"
    )
    texts.add_argument("--template", help="instead of the task's template; names fields of the record: 'Q: {question}'")
    texts.add_argument("--chat_template", action="store_true", help="wrap texts in the model's chat template")
    texts.add_argument("--skip", type=count, default=0, help="texts left out at the beginning (0)")
    texts.add_argument(
        "--limit",
        type=positive,
        help=f"how many texts (all; run takes {TEXTS_OF_LARGE} of {BUILTIN} if the model has a billion weights or more; needed "
        f"with --dataset {SELF})",
    )
    texts.add_argument("--max_length", type=positive, default=512, help="tokens of a text; the rest is cut off (512)")
    texts.add_argument("--max_new_tokens", type=count, default=128, help="greedy tokens after a text; 0: none (128)")
    texts.add_argument("--seed", type=int, default=0, help="of the sampling of --dataset self (0)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = flags.add_model(parser)
    flags.add_computing(model)
    model.add_argument(
        "--dtype", choices=FLOAT_DTYPES, default="auto", help="of the weights; auto: as the checkpoint says"
    )
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: all GPUs if there are any")
    model.add_argument("--batch_size", type=positive, default=8, help="texts at a time; no influence on the result (8)")


def text_source(arguments: argparse.Namespace) -> ResolvedSource:
    """The source that the arguments name; PartInferError for what is unknown, or would fail only after a long run."""
    source = TextSource(
        arguments.dataset,
        arguments.task_type,
        arguments.dataset_config,
        arguments.dataset_split,
        arguments.text_field,
        arguments.template,
    ).resolve()
    own = source.dataset == SELF
    if own and (arguments.limit is None or arguments.max_new_tokens == 0 or arguments.skip):
        raise PartInferError("--dataset self needs --limit and --max_new_tokens above 0, and no --skip")
    if arguments.chat_template and (own or source.language_modelling):
        raise PartInferError(
            "--chat_template is for prompts, not for documents or the model's own texts: leave it out, or give a task"
        )
    return source


def positive(text: str) -> int:
    """argparse type: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value


def count(text: str) -> int:
    """argparse type: a whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text}")
    return value


def fraction(text: str) -> float:
    """argparse type: a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction from 0 to 1, got {text}")
    return value


def add_output_arguments(parser: argparse.ArgumentParser, what: str, *, resume: str) -> argparse._ArgumentGroup:
    """--output FILE (`what`: which file, and its default), --resume (its help) or --overwrite, --json and --quiet."""
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, help=what)
    again = output.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help=resume)
    again.add_argument("--overwrite", action="store_true", help="replace the output; start again")
    flags.add_json(output)
    flags.add_quiet(output)
    return output


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """--overwrite, of commands that are done in a moment."""
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
