"""Keeps a run safe on disk: a lock, a checkpoint, and interrupts that wait until a step is complete."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from transformers_patches.errors import PartInferError
from transformers_patches.files import check_new, check_regular, save_tensors_atomic
from transformers_patches.locks import exclusive


@dataclass(frozen=True)
class Progress:
    """How much of a run is done."""

    windows: int = 0  # whole windows that are done
    batches: int = 0  # batches of the next window that are done
    texts: int = 0  # texts in these windows and batches
    digest: str = ""  # of the texts in the whole windows

    def after_batch(self, texts: int) -> Progress:
        return replace(self, batches=self.batches + 1, texts=self.texts + texts)

    def after_window(self, digest: str) -> Progress:
        return replace(self, windows=self.windows + 1, batches=0, digest=digest)


class CheckpointFile:
    """The state of an unfinished run, beside its output: `<output>.checkpoint`. Subclasses say what the state is."""

    format: str  # what marks the file as one of a kind of run

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.checkpoint")

    def exists(self) -> bool:
        return self.path.exists()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def begin(self, *, resume: bool, overwrite: bool) -> bool:
        """Make way for a run, and return whether it continues from the checkpoint.

        Raises PartInferError if an earlier run's work would be lost and `overwrite` is not set, and for an output that
        is not a file.
        """
        check_regular(self.output)
        if overwrite:
            self.remove()
            return False
        if self.exists() and not resume:
            raise PartInferError(
                f"{self.path} is left over from an interrupted run: continue it with --resume, or start again with "
                "--overwrite"
            )
        if not self.exists():
            check_new(self.output, overwrite=False)
        return self.exists()

    def _write(self, tensors: dict[str, torch.Tensor], state: dict, settings: dict) -> None:
        """Replace the checkpoint. The values of `state` and `settings` must be JSON."""
        metadata = {name: json.dumps(value) for name, value in {**state, "settings": settings}.items()}
        save_tensors_atomic(self.path, tensors, {"format": self.format, **metadata})

    def _read(self, settings: dict) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and state; PartInferError if the checkpoint is damaged or from a run with other settings."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise PartInferError(f"{self.path} can't be read: {error}; start again with --overwrite") from None
        if metadata.pop("format", None) != self.format:
            raise PartInferError(f"{self.path} is not a checkpoint of this command; start again with --overwrite")
        state = {name: json.loads(value) for name, value in metadata.items()}
        _check_settings(state.pop("settings"), settings)
        return tensors, state


class ProfileCheckpoint(CheckpointFile):
    """The state of an unfinished `run`: the sums of the texts that are done."""

    format = "partinfer-profiler-checkpoint-2"

    def save(self, progress: Progress, sums: dict[str, torch.Tensor], tokens: int, settings: dict) -> None:
        """Replace the checkpoint.

        sums: float64, by name, over `tokens`
        settings: everything that affects the result
        """
        self._write(sums, {"progress": vars(progress), "tokens": tokens}, settings)

    def load(self, settings: dict) -> tuple[Progress, dict[str, torch.Tensor], int]:
        """Progress, sums and tokens; PartInferError if the checkpoint is damaged or from a run with other settings."""
        sums, state = self._read(settings)
        return Progress(**state["progress"]), sums, state["tokens"]


def _check_settings(theirs: dict, ours: dict) -> None:
    """Raise PartInferError, naming the first difference, unless an unfinished run had the same settings."""
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise PartInferError(
                f"the unfinished run had {name} {theirs.get(name)!r}, this one has {ours.get(name)!r}: "
                "use the same arguments with --resume, or start again with --overwrite"
            )


def check_output(path: Path) -> None:
    """Raise PartInferError for a path that can't hold a neuron file with statistics."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise PartInferError(
            f"--output {path}: expected a file whose name ends in .safetensors, which keeps the statistics; "
            "python -m profiler convert turns it into JSON"
        )
    check_regular(path)


@contextmanager
def new_output(output: Path, *, overwrite: bool) -> Iterator[None]:
    """Hold the lock of an output that is made in one go; PartInferError if it is there and is not to be replaced."""
    with exclusive(output):
        check_new(output, overwrite=overwrite)
        yield


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, so that the block is done completely."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt
