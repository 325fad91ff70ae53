"""What one process of a speed measurement holds and runs, and what a run takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evaluation.methods import Configuration


@dataclass(frozen=True)
class Job:
    """One model in one process.

    engine: partinfer | transformers | llama.cpp; label: of its row; dtype: of the weights, as --dtype names it (of a GGUF:
    by its own name); float_dtype: the type of random weights, and of those that transformers loads; folder: the checkpoint, or shape: random weights of this shape; configuration: what partinfer is
    loaded with; gguf: the file that llama.cpp reads, and what one token reads of it.
    """

    engine: str
    label: str
    dtype: str
    float_dtype: str
    folder: Path | None
    shape: str | None
    threads: int
    device: str
    seed: int
    configuration: Configuration | None = None
    task_type: str | None = None
    random_neurons_filepath: str | None = None
    gguf: Path | None = None
    gguf_bytes_per_token: int | None = None


@dataclass(frozen=True)
class Timing:
    """One answer: seconds from its start to each of its tokens (of all sequences of a batch at once)."""

    token_seconds: tuple[float, ...]

    @property
    def first_token_s(self) -> float:
        return self.token_seconds[0]

    @property
    def decode_steps_per_second(self) -> float:
        return (len(self.token_seconds) - 1) / (self.token_seconds[-1] - self.token_seconds[0])


class Engine(Protocol):
    """A loaded model. variants: the ways it is run, by the label of their row; load_s: seconds that loading took."""

    variants: list[str]
    load_s: float

    def run(self, variant: str, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Prefill the prompts (all of one length), then decode greedily, no end token. Raises PartInferError."""
        ...

    def facts(self, variant: str) -> dict:
        """Names and values for the row: bytes, and neurons as counted in the runs since the last call."""
        ...


class Stopwatch:
    """Times tokens: a streamer for transformers' generate(), which says the prompt first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._prompt_seen = False
        self._started = time.perf_counter()

    def put(self, value) -> None:
        if self._prompt_seen:
            self.seconds.append(time.perf_counter() - self._started)
        self._prompt_seen = True

    def end(self) -> None:
        pass

    def timing(self) -> Timing:
        return Timing(tuple(self.seconds))
