"""What a process of a speed measurement loads and runs, and how its answers are timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evaluation.compared.kinds import ComparedFile
from evaluation.methods import Configuration


@dataclass(frozen=True)
class Job:
    """One model in one process."""

    engine: str  # partinfer, transformers or llama.cpp
    label: str  # of its row
    dtype: str  # of the weights, as --dtype or GGUF names it
    float_dtype: str  # of random weights, and of the weights that transformers loads
    folder: Path | None  # the checkpoint; None: random weights of `shape`
    shape: str | None  # a known shape, or a config.json; None: `folder` has the weights
    threads: int  # of the computation
    device: str  # as PyTorch names it
    seed: int  # of random weights and rankings
    ignored_gguf_keys: frozenset[str] = frozenset()  # what --ignore_gguf_key named: a new process knows no flags
    configuration: Configuration | None = None  # for partinfer: method and settings
    task_type: str | None = None  # for partinfer: whose neuron file is looked up
    random_neurons_filepath: str | None = None  # for partinfer: the random ranking; None: a seeded one
    compared: ComparedFile | None = None  # for llama.cpp: what it reads


@dataclass(frozen=True)
class Timing:
    """The times of one answer, or of a batch of answers decoded together."""

    token_seconds: tuple[float, ...]  # seconds from the start to each token

    @property
    def first_token_s(self) -> float:
        return self.token_seconds[0]

    @property
    def decode_steps_per_second(self) -> float:
        return (len(self.token_seconds) - 1) / (self.token_seconds[-1] - self.token_seconds[0])


class Engine(Protocol):
    """A loaded model."""

    variants: list[str]  # the ways in which it is run, each by the label of its row
    load_s: float  # seconds that loading took

    def run(self, variant: str, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Prefill prompts of one length, then decode greedily, without an end token. Raises PartInferError."""
        ...

    def facts(self, variant: str) -> dict:
        """Values for the row, by name: bytes, and the neurons counted in the runs since the last call."""
        ...


class Stopwatch:
    """Times tokens. It is a streamer for transformers' generate(), which passes the prompt first."""

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
