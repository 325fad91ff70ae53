"""Calls of what reads neurons on demand, for operation_calls.py: over a file of random bytes."""

from __future__ import annotations

import atexit
import os
import random
import tempfile
from functools import cache
from pathlib import Path

import torch

ROWS = "rows_on_disk"
LAYERS, UNIT = 2, 64


@cache
def a_file() -> str:
    """A file of 1 MB, there until the process ends."""
    descriptor, path = tempfile.mkstemp(prefix="partinfer-fuzz-")
    os.write(descriptor, random.Random(0).randbytes(2**20))
    os.close(descriptor)
    atexit.register(Path(path).unlink, missing_ok=True)
    return path


def rows_steps(source: random.Random, rows: int, record: int) -> list[tuple[str, list]]:
    """The calls that make rows on disk and use them; the first makes the object."""
    steps = [("RowsOnDisk", [[a_file()], record, 2, 8192])]
    start = source.choice((0, UNIT, 4096 + 3 * UNIT))
    for number in range(LAYERS):
        steps.append(("add_layer", [0, start + number * rows * record, rows, source.choice((0, rows // 3, rows))]))
    return [*steps, ("load", []), ("view", [0]), ("fetch", [1]), ("take_counts", []), ("bytes_in_memory", [])]


def loaded_rows(source: random.Random, rows: int, record: int):
    """The object after these calls."""
    (_, arguments), *steps = rows_steps(source, rows, record)
    made = torch.classes.partinfer.RowsOnDisk(*arguments)
    for name, given in steps[: LAYERS + 1]:
        getattr(made, name)(*given)
    return made
