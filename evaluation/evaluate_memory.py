#!/usr/bin/env python3
"""Measure decoding in processes whose memory is limited, with nothing in the page cache before."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evaluation.memory.runs import Comparison, limited_run, prompts_of
from evaluation.tables import markdown_table
from transformers_patches import cli, flags
from transformers_patches.config import parse_bytes
from transformers_patches.errors import PartInferError

COMPARED = ("llama.cpp", "accelerate")
COLUMNS = (
    *("limit MB", "method", "tokens/s", "worst", "first token s", "disk MB/token", "hit rate", "resident", "peak MB"),
    "limited by",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    flags.add_model(parser, None)
    add = parser.add_argument
    add("--limits", default="2G,1500M,1200M,900M,700M", help="for the whole process (2G,1500M,1200M,900M,700M)")
    add("--compare", default="", metavar="LIST", help=f"also {', '.join(COMPARED)}")
    add("--gguf", metavar="FILE", help="of llama.cpp")
    add("--plain", metavar="FOLDER", help="the checkpoint that accelerate keeps on disk")
    add("--prompts", type=int, default=3, help="of different kinds (3)")
    add("--prompt_length", type=int, default=64, help="tokens of a prompt (64)")
    add("--num_tokens_to_generate", type=int, default=64, help="tokens after each prompt (64)")
    add("--seconds", type=float, default=120, help="after which a process stops, with the tokens so far (120)")
    add("--threads", type=int, default=2, help="CPU threads (2)")
    add("--margin", default="20M", help="what is kept free of a limit: --memory is so much less (20M)")
    add("--plot", metavar="FILE", help="write a figure of tokens/s against the limit")
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_config(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = flags.parse(parser, argv)
    try:
        flags.check_model(arguments)
        limits = [_bytes(text) for text in arguments.limits.split(",")]
        margin, compared = _bytes(arguments.margin), _compared(arguments)
    except PartInferError as error:
        parser.error(str(error))
    from transformers_patches.weights.lookup import find_model

    folder = find_model(arguments.model_name, arguments.checkpoint_path)
    prompts = prompts_of(folder, arguments.prompts, arguments.prompt_length)
    rows = []
    for limit in limits:
        for one in (Comparison("partinfer", str(folder), memory=limit - margin), *compared):
            found = limited_run(one, prompts, limit, arguments)
            rows.append(_row(one, limit, found))
            if not arguments.quiet:
                print(markdown_table(rows[-1:], COLUMNS).splitlines()[-1], file=sys.stderr, flush=True)
    cli.report(arguments.json, {"rows": rows}, markdown_table(rows, COLUMNS), indent=1)
    if arguments.plot:
        from evaluation.memory.plot import plot_limits

        plot_limits(rows, folder.name, Path(arguments.plot))
    return cli.DONE


def _bytes(text: str) -> int:
    size = parse_bytes(text)
    if size is None:
        raise PartInferError(f"expected a number of bytes such as 900M, got {text!r}")
    return size


def _compared(arguments: argparse.Namespace) -> list[Comparison]:
    """PartInferError for a name that is not known, or whose model is not given."""
    paths = {"llama.cpp": ("gguf", arguments.gguf), "accelerate": ("plain", arguments.plain)}
    found = []
    for name in filter(None, (part.strip() for part in arguments.compare.split(","))):
        if name not in paths:
            raise PartInferError(f"--compare must name some of {', '.join(COMPARED)}, got {name!r}")
        flag, path = paths[name]
        if not path:
            raise PartInferError(f"--compare {name} needs --{flag}")
        found.append(Comparison(name, path))
    return found


def _row(one: Comparison, limit: int, found: dict) -> dict:
    """One line of the table. A process that could not run has its reason in place of its speed."""
    row = {"limit MB": round(limit / 1e6), "method": one.engine, "limited by": found["limited by"]}
    if "failed" in found:
        return row | {"tokens/s": found["failed"]}
    speeds = [prompt["tokens_per_second"] for prompt in found["prompts"] if prompt["tokens_per_second"]]
    disk = [prompt["token_disk_mb"] for prompt in found["prompts"] if prompt["token_disk_mb"] is not None]
    hits = [prompt["hit_rate"] for prompt in found["prompts"] if prompt.get("hit_rate") is not None]
    return row | {
        "tokens/s": statistics.median(speeds) if speeds else None,
        "worst": min(speeds, default=None),
        "first token s": statistics.median(prompt["first_token_s"] for prompt in found["prompts"]),
        "disk MB/token": statistics.median(disk) if disk else None,
        "hit rate": statistics.median(hits) if hits else None,
        "resident": found["prompts"][0].get("resident"),
        "peak MB": round(found["peak_mb"]),
    }


if __name__ == "__main__":
    cli.run(main)
