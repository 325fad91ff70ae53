"""Rows of a perplexity measurement: one configuration or one of llama.cpp's files after the other, on the same examples."""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import replace
from pathlib import Path

import torch

from evaluation.bootstrap import Bootstrap
from evaluation.compared.files import ComparedFiles
from evaluation.compared.kinds import ComparedFile
from evaluation.kept_rows import KeptRows
from evaluation.methods import Configuration
from evaluation.models import load_configuration
from evaluation.perplexity import DenseLogits, method_logits, result_row, score_examples, together
from evaluation.processes import Processes, merged_counts
from evaluation.weights import weight_counts
from evaluation.windows import Example
from transformers_patches.load.loaded_model import LoadedModel


class PerplexityRows:
    """Measures rows in any order, but the first dense configuration before all others: they are compared to its logits.

    folder: the model
    examples: those that are scored
    batch_size: how many are scored together; None: token by token, as decoding computes
    arguments: of the script: --task_type, --random_neurons_filepath, --seed, --bootstrap_iters, --quiet, --threads
    store: where the dense model's logits are kept; None: no row is compared to it
    processes: which share the examples among them; all of them have the rows. None: this one is alone
    kept: a file for rows that are finished; None: there is none
    """

    def __init__(
        self,
        folder: Path,
        examples: list[Example],
        batch_size: int | None,
        arguments: argparse.Namespace,
        store: DenseLogits | None,
        processes: Processes | None = None,
        kept: Path | None = None,
    ) -> None:
        self.folder, self.examples, self.batch_size, self.arguments = folder, examples, batch_size, arguments
        self._store, self._processes = store, processes or Processes()
        self._bootstrap = Bootstrap(len(examples), arguments.bootstrap_iters, arguments.seed)
        self._dense: dict | None = None
        self._tables: dict[str, dict] = {}
        self.kept = KeptRows(kept, self._conditions())

    def _conditions(self) -> list:
        """What all rows have in common, for the file of finished ones."""
        given = self.arguments
        examples = [[example.context, example.target] for example in self.examples]
        resampling = [given.bootstrap_iters, given.seed]
        return [str(self.folder), examples, self.batch_size, resampling, given.task_type, self._store is not None]

    def finished(self, configuration: Configuration, same: Configuration | None = None) -> dict | None:
        """The row of a configuration that a stopped run has left; None: it must be measured."""
        found = self.kept.find(configuration, same)
        if found is None:
            return None
        row, table = found
        self._tables[configuration.label] = table
        if self._dense is None and self._store is not None and configuration.method == "dense":
            self._dense = table
        return row

    def row(self, configuration: Configuration, same: Configuration | None = None) -> dict:
        """The row of a configuration. same: a configuration measured before, for perplexity_ratio; may be this one."""
        self._say(configuration.label)
        loaded = load_configuration(configuration, self.folder, self.arguments)
        loaded.reset_counters()
        is_dense = self._dense is None and self._store is not None and configuration.method == "dense"
        if is_dense:
            self._store.check_space(self.examples, loaded.model.config.vocab_size, loaded.model.dtype.itemsize)
        share = (self._processes.number, self._processes.count)
        logits = method_logits(loaded.model, self.examples, self.batch_size, share)
        table = self._score(logits, is_dense=is_dense)
        loaded.check_weights()
        self._tables[configuration.label] = table
        same_table = None if same is None else self._tables[same.label]
        counts = merged_counts(self._processes.gathered(weight_counts(loaded)))
        what = _settings(configuration, loaded) | counts
        row = result_row(what, table, self._dense, same_table, self._bootstrap)
        if self._processes.first:
            self.kept.keep(configuration, same, row, table)
        del loaded, logits  # one model at a time in memory
        gc.collect()
        return row

    def compared_row(self, file: ComparedFile) -> dict:
        """The row of one of llama.cpp's files."""
        from evaluation.compared.scoring import LlamaCppModel, compared_logits

        self._say(file.label)
        longest = max(len(example.context) + len(example.target) for example in self.examples)
        model = LlamaCppModel(file.path, longest, self.arguments.threads or torch.get_num_threads())
        try:
            table = self._score(compared_logits(model, self.examples, token_by_token=self.batch_size is None))
            what = {
                "label": file.label,
                "method": "llama.cpp",
                "dtype": file.kind,
                "settings": file.note,
                "ffn_bytes_fraction": 1.0,
                "weight_bytes_resident": model.resident_bytes,
                "token_bytes": file.token_bytes,
                "block_bytes_fraction": 1.0,
            }
        finally:
            model.close()
        return result_row(what, table, self._dense, None, self._bootstrap)

    def _score(self, logits, *, is_dense: bool = False) -> dict:
        store = self._store if is_dense or self._dense is not None else None
        table = score_examples(logits, self.examples, store, is_dense=is_dense)
        table = together(self._processes.gathered(table))
        if is_dense:
            self._dense = table
        return table

    def _say(self, label: str) -> None:
        how = "" if self.batch_size else ", token by token"
        if not self.arguments.quiet:
            print(f"{label}: {len(self.examples)} examples{how}", file=sys.stderr)


def measure(
    rows: PerplexityRows, grid: list[Configuration], files: ComparedFiles | None, kinds: list[str]
) -> list[dict]:
    """The rows of a grid, then those of llama.cpp's types. With several types, a method is also compared to itself."""
    typed = bool(rows.arguments.dtypes)
    found, order = {}, in_order(grid)
    sames = {c.label: _in_first_type(c, grid) if typed else None for c in order}
    missing = [c for c in order if rows.kept.find(c, sames[c.label]) is None]
    if (missing or kinds) and first_dense(grid) not in (None, *missing):
        missing.insert(0, first_dense(grid))  # the others are compared to its logits, which are not kept
    for configuration in order:
        same = sames[configuration.label]
        row = rows.row(configuration, same) if configuration in missing else rows.finished(configuration, same)
        found[configuration.label] = row
    return [found[configuration.label] for configuration in grid] + [rows.compared_row(files.file(k)) for k in kinds]


def in_order(grid: list[Configuration]) -> list[Configuration]:
    """The grid with the first dense configuration in front."""
    dense = first_dense(grid)
    return sorted(grid, key=lambda configuration: configuration is not dense)


def first_dense(grid: list[Configuration]) -> Configuration | None:
    """The configuration that the others are compared to."""
    return next((configuration for configuration in grid if configuration.method == "dense"), None)


def _in_first_type(configuration: Configuration, grid: list[Configuration]) -> Configuration:
    """The same settings in the first type of the grid."""
    return next(
        other for other in grid if replace(other.settings, dtype=configuration.settings.dtype) == configuration.settings
        and other.method == configuration.method
    )  # fmt: skip


def _settings(configuration: Configuration, loaded: LoadedModel) -> dict:
    settings = configuration.settings
    return {
        "label": configuration.label,
        "method": configuration.method,
        "sparsity": settings.sparsity if settings.computes_sparsely else None,
        "loaded_neurons_percent": settings.loaded_neurons_percent if settings.use_partial_loading else 1.0,
        "base_neurons_percent": settings.base_neurons_percent if settings.use_partial_loading else None,
        "dtype": loaded.settings.dtype,
        "token_sparsity": settings.token_sparsity if settings.computes_sparsely else None,
        "selection": loaded.settings.selection if settings.computes_sparsely else None,
        "compensation": loaded.settings.compensation,
        **_published(configuration),
    }


def _published(configuration: Configuration) -> dict:
    """The settings of a published baseline, for its row."""
    if configuration.published is None:
        return {}
    names = {"sparsity": "paper_sparsity", "calibration": "calibration", "tokens": "calibration_tokens"}
    return {name: getattr(configuration.published, field) for field, name in names.items()}
