"""A profiling run: windows of texts go through the model, with a checkpoint after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from tqdm import tqdm

from profiler.collect import Collector
from profiler.processes import from_main, total, totals
from profiler.sequences import Sequence, Window
from profiler.statistics import ActivationStatistics, NonFiniteActivation
from profiler.store import ProfileCheckpoint, Progress, interrupts_deferred
from transformers_patches.errors import PartInferError

# Yields the windows of a source: from the first one, or from Progress.windows on if the source can start there.
WindowSource = Callable[[Progress], Iterator[Window]]


@dataclass
class ProfilingRun:
    """Counts the activations of a source's texts, continuing from a checkpoint if asked to.

    Several processes take batches in turn and add up their sums at the end of every window, so the order of additions
    does not depend on where a run was interrupted.
    """

    collector: Collector  # runs the batches and holds the statistics
    windows: WindowSource  # gives the texts
    batch_size: int  # texts at a time
    checkpoint: ProfileCheckpoint  # written after every window
    settings: dict  # everything that affects the result; a resumed run must have the same
    processes: PartialState  # of `accelerate launch`
    describe: Callable[[list[int]], str]  # token ids -> text, for messages
    total: int | None = None  # number of texts, if known, for the progress bar
    quiet: bool = False  # without a progress bar
    progress: Progress = field(default_factory=Progress)  # how much is done

    @property
    def statistics(self) -> ActivationStatistics:
        return self.collector.statistics

    def run(self, *, resume: bool) -> None:
        """Process all remaining texts. The main process's statistics then hold the totals.

        Raises PartInferError for NaN or Inf (naming layer and text), if the source has changed since the checkpoint,
        and if it has no texts. On Ctrl-C a single process saves a checkpoint; several keep the last window's.
        """
        if resume:
            self._restore()
        try:
            self._process_windows()
        except KeyboardInterrupt:
            if self.processes.num_processes == 1 and self.progress.texts:
                with interrupts_deferred():
                    self.statistics.discard()
                    self._save()
            raise
        if not self.progress.texts:
            raise PartInferError("there are no texts: check --dataset, --skip and --limit")

    def _process_windows(self) -> None:
        done = self.progress
        hidden = self.quiet or not self.processes.is_main_process
        with tqdm(total=self.total, initial=done.texts, unit=" texts", desc="profiling", disable=hidden) as bar:
            for window in self.windows(done):
                if window.index >= done.windows:
                    self._process(window, bar)
                elif window.index == done.windows - 1 and window.digest != done.digest:
                    raise PartInferError(
                        "the texts have changed since the run was interrupted: start again with --overwrite"
                    )

    def _process(self, window: Window, bar: tqdm) -> None:
        for number, batch in enumerate(window.batches(self.batch_size)):
            if number < self.progress.batches:
                continue  # done before the run was interrupted
            mine = number % self.processes.num_processes == self.processes.process_index
            tokens = self._observe(batch) if mine else 0
            with interrupts_deferred():
                if mine:
                    self._commit(batch, tokens)
                self.progress = self.progress.after_batch(len(batch))
            bar.update(len(batch))
        with interrupts_deferred():
            self._add_up_processes()
            self.progress = self.progress.after_window(window.digest)
            self._save()

    def _observe(self, batch: list[Sequence]) -> int:
        try:
            return self.collector.observe([sequence.ids for sequence in batch])
        except torch.OutOfMemoryError:
            longest = max(len(sequence.ids) for sequence in batch)
            raise PartInferError(
                f"out of GPU memory with a batch of {len(batch)} texts of up to {longest} tokens: "
                "start again with --overwrite and a lower --batch_size or --max_length"
            ) from None

    def _commit(self, batch: list[Sequence], tokens: int) -> None:
        try:
            self.statistics.commit(tokens)
        except NonFiniteActivation as error:
            layer, text = self._blame(batch, error.layer)
            raise PartInferError(
                f"NaN or Inf among the activations of layer {layer}, {text}: "
                "use --dtype float32, or leave the text out; nothing was written for this batch"
            ) from None

    def _blame(self, batch: list[Sequence], layer: int) -> tuple[int, str]:
        """Layer and description of the text to blame: each text of the batch goes through the model alone."""
        for sequence in batch:
            self.statistics.discard()
            self.collector.observe([sequence.ids])
            try:
                self.statistics.check_pending()
            except NonFiniteActivation as error:
                return error.layer, f"text {sequence.number} (from 0), {self.describe(sequence.ids)[:60]!r}"
        numbers = ", ".join(str(sequence.number) for sequence in batch)
        return layer, f"only when texts {numbers} (from 0) are in one batch"

    def _add_up_processes(self) -> None:
        """Move the sums of all processes to the main process."""
        if self.processes.num_processes == 1:
            return
        sums = totals(self.statistics.sums(), self.processes)
        tokens = int(total(torch.tensor(self.statistics.tokens), self.processes))
        main = self.processes.is_main_process
        if not main:
            sums = {name: torch.zeros_like(values) for name, values in sums.items()}
        self.statistics.restore(sums, tokens if main else 0)

    def _save(self) -> None:
        if self.processes.is_main_process:
            statistics = self.statistics
            self.checkpoint.save(self.progress, statistics.sums(), statistics.tokens, self.settings)

    def _restore(self) -> None:
        if self.processes.is_main_process:
            self.progress, sums, tokens = self.checkpoint.load(self.settings)
            self.statistics.restore(sums, tokens)
        self.progress = from_main(self.progress, self.processes)
