#!/usr/bin/env python3
"""Perplexity, KL divergence to the dense model and top-1 agreement of several methods on the same windows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evaluation.compared.kinds import HELP, parse_compared
from evaluation.methods import Configuration, add_dtypes_argument, add_method_arguments, build_typed_grid
from evaluation.tables import markdown_table
from evaluation.windows import HALVES, PREFILL_TOKENS, SCORED_TOKENS, Example, Source, read_examples
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError
from transformers_patches.files import scratch_folder

if TYPE_CHECKING:
    from evaluation.processes import Processes

DEFAULT_METHODS = "dense,dense+partial,partinfer,coreinfer"
BATCH_SIZE = 4
DATASET_HELP = (
    "a file: plain text, JSON lines, CSV, TSV or Parquet, also compressed with gzip; a folder that download.py saved; or a "
    "hub id (ID or ID:CONFIG)"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_method_arguments(parser, DEFAULT_METHODS)
    add_dtypes_argument(parser)
    add = parser.add_argument
    add("--dataset", required=True, metavar="FILE-or-hub-id", help=DATASET_HELP)
    add("--split", default="test", help="split of a saved or hub data set (test)")
    add("--half", default="all", choices=HALVES, help="which half of the examples, in order (all)")
    add("--limit", type=int, metavar="WINDOWS", help="measure on a sample of this size (all)")
    add("--prefill_tokens", type=int, default=PREFILL_TOKENS, help=f"context of a window ({PREFILL_TOKENS})")
    add("--scored_tokens", type=int, default=SCORED_TOKENS, help=f"scored part of a window ({SCORED_TOKENS})")
    add("--prompt_template", help='rows instead of a text: what is prefilled, such as "Question: {question}\\nAnswer:"')
    add("--target_template", help='what is scored after it, such as " {answer}"')
    add("--batch_size", type=int, help=f"windows that are scored together ({BATCH_SIZE})")
    add(
        "--token_by_token",
        action="store_true",
        help="score as decoding computes: one token at a time, through the kernels of generation (slower, exact)",
    )
    add("--compare", default="", metavar="LIST", help=f"also measure {HELP}")
    add("--bootstrap_iters", type=int, default=1000, help="resamples of the confidence intervals (1000)")
    add("--seed", type=int, default=0, help="of the sample, the bootstrap, and random rankings without a file (0)")
    add(
        "--skip_finished",
        action="store_true",
        help="go on where a run with the same settings and --json FILE was stopped: rows that it has finished are kept",
    )
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_config(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = flags.parse(parser, argv)
    try:
        grid, source = build_typed_grid(arguments), _source(arguments)
        batch_size = _batch_size(arguments)
        flags.check_model(arguments)
        parse_compared(arguments.compare)
        kept = _kept_path(arguments)
        if arguments.bootstrap_iters < 1:
            raise PartInferError(f"bootstrap_iters must be at least 1, got {arguments.bootstrap_iters}")
    except PartInferError as error:
        parser.error(str(error))
    cli.begin(arguments)
    # heavy imports only now: --help and wrong usage answer at once
    from evaluation.models import model_label, settled
    from evaluation.processes import Processes
    from transformers_patches.weights.lookup import find_model
    from transformers_patches.weights.model_files import load_tokenizer, read_config

    folder = find_model(arguments.model_name, arguments.checkpoint_path)
    tokenizer = load_tokenizer(folder)
    examples = read_examples(source, tokenizer, read_config(folder).max_position_embeddings)
    grid = [settled(configuration, folder, arguments.task_type) for configuration in grid]
    processes = Processes()
    arguments.quiet = arguments.quiet or not processes.first
    if parse_compared(arguments.compare):
        processes.refuse_several("--compare")
    rows = _measure(grid, folder, examples, batch_size, arguments, processes)
    if not processes.first:
        return cli.DONE
    result = {
        "model": model_label(folder),
        "dataset": source.dataset,
        "half": source.half,
        "scoring": "one_pass" if batch_size else "token_by_token",
        "task_type": arguments.task_type,
        "examples": len(examples),
        "scored_tokens": sum(len(example.target) for example in examples),
        "seed": arguments.seed,
        "rows": rows,
    }
    cli.report(arguments.json, result, _table(rows), indent=1)
    if kept is not None:
        kept.unlink(missing_ok=True)  # the result has all rows
    return cli.DONE


def _kept_path(arguments: argparse.Namespace) -> Path | None:
    """Where finished rows are kept until all are there: beside the file of --json. PartInferError if there is none."""
    in_file = arguments.json not in (None, flags.STANDARD_OUTPUT)
    if arguments.skip_finished and not in_file:
        raise PartInferError("--skip_finished keeps rows beside the file of --json: give --json FILE")
    return Path(f"{arguments.json}.rows") if arguments.skip_finished else None


def _source(arguments: argparse.Namespace) -> Source:
    return Source(**{name: getattr(arguments, name) for name in Source.__dataclass_fields__})


def _batch_size(arguments: argparse.Namespace) -> int | None:
    """Windows that are scored together; None for token by token. PartInferError for wrong usage."""
    size = arguments.batch_size
    if size is not None and size < 1:
        raise PartInferError(f"batch_size must be at least 1, got {size}")
    if arguments.token_by_token and size not in (None, 1):
        raise PartInferError(f"--token_by_token decodes one window at a time: leave out --batch_size {size}")
    return None if arguments.token_by_token else size or BATCH_SIZE


def _measure(
    grid: list[Configuration],
    folder: Path,
    examples: list[Example],
    batch_size: int | None,
    arguments: argparse.Namespace,
    processes: Processes,
) -> list[dict]:
    """A row per configuration and per type of llama.cpp. batch_size: all rows, the dense ones too, are scored alike."""
    from evaluation.compared.files import ComparedFiles, own_kind
    from evaluation.perplexity import dense_logits
    from evaluation.perplexity_rows import PerplexityRows, first_dense, measure
    from transformers_patches.weights.model_files import open_weights, read_config

    compared = parse_compared(arguments.compare)
    with dense_logits() as store, scratch_folder("compared") as scratch:
        files, config = None, read_config(folder)
        if compared:
            files = ComparedFiles(folder, lambda: open_weights(folder), config, own_kind(config), scratch)
        own = own_kind(config, arguments.dtype)
        kept = store if first_dense(grid) else None
        rows = PerplexityRows(folder, examples, batch_size, arguments, kept, processes, _kept_path(arguments))
        processes.gathered(None)  # nobody writes before all have read
        return measure(rows, grid, files, [kind or own for kind in compared])


def _table(rows: list[dict]) -> str:
    columns = ["label", "nll", "perplexity", "excess_nll", "kl_to_dense", "top1_agreement", "ffn_bytes_fraction"]
    columns += ["block_bytes_fraction", "token_bytes"]
    if any(row["perplexity_ratio"] is not None for row in rows):
        columns.insert(3, "perplexity_ratio")
    notes = [f"{row['label']}: {row['settings']}" for row in rows if row.get("settings")]
    return "\n".join([markdown_table(rows, columns), *([""] if notes else []), *notes])


def run() -> None:
    """The installed command."""
    cli.run(main)


if __name__ == "__main__":
    run()
