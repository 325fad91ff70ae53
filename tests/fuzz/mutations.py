"""What all campaigns of damaged and hostile files have in common: mutated bytes and values, a bound on time, outcomes."""

from __future__ import annotations

import copy
import json
import random
import signal
import struct
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from transformers_patches.errors import PartInferError

LONGEST_S = 20  # for one file, on a busy machine
READ, REFUSED = "read", "refused"
NUMBERS = [0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
VALUES = [  # for places in JSON
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**31, 2**63, 10**30, 0.0, 0.5, -1.5, 1e308),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "0",
        "false",
        "llama",
        "torch.bfloat16",
        "x" * 5000,
        "\n{%",
        "\ud800",
    ),
    *([], [0], [1, 2, 3], [None], [[[]]], {}, {"a": 1}, {"factor": 2.0, "rope_type": "linear"}, {"rope_type": "yarn"}),
]


@contextmanager
def within(seconds: int):
    """TimeoutError if the block takes longer."""

    def late(signum, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(use: Callable[[Path], object], path: Path) -> str:
    """READ, REFUSED, or what else came of using a file: the foreign exception, or a message that is not one short line."""
    try:
        with within(LONGEST_S):
            use(path)
    except PartInferError as error:
        text = str(error)
        return (
            REFUSED if "\n" not in text and len(text) < 3000 else f"a message of {len(text)} characters: {text[:200]!r}"
        )
    except Exception as error:
        return f"{use.__name__}: {type(error).__name__}: {error}"[:300]
    return READ


def changed_bytes(data: bytes, header: int, source: random.Random) -> bytes:
    """Flipped, cut, repeated, overwritten by large numbers: mostly in the header, where it hurts."""
    place = source.randrange(header if source.random() < 0.9 else len(data))
    changed = bytearray(data)
    kind = source.choice(("flip", "flip", "cut", "number", "short number", "repeat", "remove"))
    if kind == "flip":
        for _ in range(source.choice((1, 1, 3, 20))):
            changed[source.randrange(header)] = source.randrange(256)
    elif kind == "cut":
        del changed[place:]
    elif kind == "number":
        changed[place : place + 8] = struct.pack("<Q", source.choice(NUMBERS))
    elif kind == "short number":
        changed[place : place + 4] = struct.pack("<I", source.choice(NUMBERS) & 0xFFFFFFFF)
    elif kind == "repeat":
        changed[place:place] = changed[place : place + source.randrange(1, 64)]
    else:
        del changed[place : place + source.randrange(1, 64)]
    return bytes(changed)


def changed_json(content: object, source: random.Random) -> str:
    """JSON in which one to three places hold something else, or which is nested deep, or has a number of many digits."""
    if source.random() < 0.05:
        return source.choice(("[" * 100_000, '{"a":' * 50_000, "1" * 10_000, "null", ""))
    content = json.loads(json.dumps(content))
    for _ in range(source.choice((1, 1, 2, 3))):
        content = _replaced(content, source)
    text = json.dumps(content)
    if source.random() < 0.05:
        text = text.replace("1", "1" * 5000, 1)
    return text


def _replaced(content: object, source: random.Random) -> object:
    """One place of a JSON value replaced, removed or added."""
    if isinstance(content, dict | list) and content and source.random() < 0.9:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = source.choice(keys)
        if source.random() < 0.15:
            del content[key]
        elif source.random() < 0.1 and isinstance(content, dict):
            content[source.choice(keys)] = copy.deepcopy(content[key])
        else:
            content[key] = _replaced(content[key], source)
        return content
    return copy.deepcopy(source.choice(VALUES))
