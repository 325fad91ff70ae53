"""One method in a limited process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from evaluation.memory.limits import drop_from_cache, limited
from transformers_patches.errors import PartInferError
from transformers_patches.files import scratch_folder
from transformers_patches.generation.prompts import predefined_prompts, task_prompt_ids
from transformers_patches.weights.model_files import load_tokenizer

PROGRAM = Path(__file__).with_name("run_limited.py")
KINDS = ("QA", "Summarize", "translate_de_en")


@dataclass(frozen=True)
class Comparison:
    """What runs: an engine of run_limited.py, and its model. memory: the bound that it is told; None: it is told none."""

    engine: str
    path: str
    memory: int | None = None


def prompts_of(folder: Path, count: int, length: int) -> list[list[int]]:
    """Token ids of the project's own prompts, one kind after the other, each `length` long."""
    tokenizer, texts = load_tokenizer(folder), [predefined_prompts(kind) for kind in KINDS]
    found = []
    for number in range(count):
        kind, own = KINDS[number % len(KINDS)], texts[number % len(KINDS)]
        text = own[number // len(KINDS) % len(own)]
        ids = task_prompt_ids(tokenizer, kind, text, None, None, False)
        found.append((ids * (length // len(ids) + 1))[:length])
    return found


def limited_run(one: Comparison, prompts: list[list[int]], limit: int, arguments: argparse.Namespace) -> dict:
    """What run_limited.py measured, or why it could not (`failed`), and what limited it."""
    with scratch_folder("memory") as scratch, limited(limit) as (kind, enter):
        job = {
            "engine": one.engine,
            "path": one.path,
            "memory": one.memory,
            "limit": limit,
            "threads": arguments.threads,
            "settings": {"context": arguments.prompt_length + arguments.num_tokens_to_generate},
            "prompts": prompts,
            "new_tokens": arguments.num_tokens_to_generate,
            "seconds": arguments.seconds,
            "scratch": str(scratch),
        }
        drop_from_cache(Path(one.path))
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        try:
            done = subprocess.run(
                [sys.executable, str(PROGRAM)],
                input=json.dumps(job),
                capture_output=True,
                text=True,
                check=False,
                env=environment,
                preexec_fn=enter,  # noqa: PLW1509 - nothing else runs in this process
                timeout=3 * arguments.seconds + 120,
            )
        except subprocess.TimeoutExpired:
            return {"failed": "too slow", "limited by": kind}
    if done.returncode < 0:
        return {"failed": "killed", "limited by": kind}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["failed"])[-1]
        return {"failed": last[:100], "limited by": kind}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise PartInferError(f"{one.engine} printed no result: {done.stderr[-300:]}")
    return json.loads(lines[-1]) | {"limited by": kind}
