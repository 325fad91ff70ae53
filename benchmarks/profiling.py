"""What the profiler's hooks cost: tokens per second of profiling against a plain forward pass over the same batches.

    python benchmarks/profiling.py --dataset builtin --task_type QA --limit 128

Prompts only. The two plain passes are the whole model (with logits) and the model's body, which is all that the
profiler runs; the share of the body's throughput is the honest one. Rounds alternate, and the medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from profiler.collect import Collector, pad
from profiler.placement import load_for_profiling
from profiler.sequences import Encoder, windows
from profiler.templates import TASK_TYPES, TEXT
from profiler.texts import TextSource
from transformers_patches.config import FLOAT_DTYPES
from transformers_patches.errors import PartInferError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--dataset", default="builtin", help="as of python -m profiler run (builtin)")
    parser.add_argument("--task_type", choices=TASK_TYPES, default="QA")
    parser.add_argument("--limit", type=int, default=128, help="texts (128)")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a text (512)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="passes over all batches, after one to warm up (5)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        result = measure(arguments)
    except PartInferError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(
        f"{result['tokens']} tokens, batches of {arguments.batch_size}, {result['dtype']}, {result['threads']} threads"
    )
    for name, rate in result["tokens_per_second"].items():
        print(f"{name:12} {rate:9.0f} tokens/s")
    print(f"profiling reaches {100 * result['share_of_body']:.1f} % of the body's pass, ", end="")
    print(f"{100 * result['share_of_model']:.1f} % of the whole model's")
    return 0


def measure(arguments: argparse.Namespace) -> dict:
    """Median tokens per second of the three passes, rounds alternating so that a busy machine slows all of them."""
    size, length = arguments.batch_size, arguments.max_length
    loaded = load_for_profiling(arguments.checkpoint_path, arguments.device, arguments.dtype, size, length)
    model, source = loaded.model, TextSource(arguments.dataset, arguments.task_type).resolve()
    encoder = Encoder(loaded.tokenizer, length, split=source.task_type == TEXT)
    (window,) = islice(windows(encoder.sequences(source.prompts()), arguments.limit), 1)
    batches = [[sequence.ids for sequence in batch] for batch in window.batches(size)]
    tokens = sum(len(ids) for batch in batches for ids in batch)
    collector = Collector.of(model, max_new_tokens=0)
    sums = collector.statistics

    def profile(batch: list[list[int]]) -> None:
        sums.commit(collector.observe(batch))

    @torch.no_grad()
    def body(batch: list[list[int]]) -> None:
        model.base_model(input_ids=pad(batch, model.device, left=False)[0], use_cache=False)

    @torch.no_grad()
    def whole(batch: list[list[int]]) -> None:
        model(input_ids=pad(batch, model.device, left=False)[0], use_cache=False)

    passes = {"profiling": profile, "body": body, "whole model": whole}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for round_ in range(arguments.rounds + 1):
        for name, run in passes.items():
            taken = time_pass(run, batches, model.device)
            if round_:
                seconds[name].append(taken)
    rates = {name: tokens / stats.median(taken) for name, taken in seconds.items()}
    return {
        "tokens": tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "tokens_per_second": rates,
        "share_of_body": rates["profiling"] / rates["body"],
        "share_of_model": rates["profiling"] / rates["whole model"],
    }


def time_pass(run: Callable, batches: list, device: torch.device) -> float:
    """Seconds for all batches."""
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
