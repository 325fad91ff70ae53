"""Rows of a perplexity measurement on disk as soon as they are there, so that a stopped run goes on with the next one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from evaluation.methods import Configuration
from transformers_patches.files import make_folder

Table = dict[str, np.ndarray]


class KeptRows:
    """One row a line, with its sums over each example. Rows of other settings or examples in the file are not found.

    path: the file; it is made with the first row. None: nothing is kept.
    shared: what all rows have in common, as JSON: the model, the examples, how they are scored
    """

    def __init__(self, path: Path | None, shared: list) -> None:
        self.path, self._shared = path, shared
        self._found: dict[str, dict] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path is not None and path.is_file() else ""
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
                self._found[entry["key"]] = entry
            except (ValueError, KeyError, TypeError):
                continue  # a line whose writing was interrupted

    def find(self, configuration: Configuration, same: Configuration | None) -> tuple[dict, Table] | None:
        """The row of a configuration and its sums per example. same: what perplexity_ratio compares it to."""
        entry = self._found.get(self._key(configuration, same))
        if entry is None:
            return None
        return entry["row"], {name: np.array(values, dtype=float) for name, values in entry["table"].items()}

    def keep(self, configuration: Configuration, same: Configuration | None, row: dict, table: Table) -> None:
        """Write a row."""
        if self.path is None:
            return
        make_folder(self.path.parent)
        sums = {name: values.tolist() for name, values in table.items()}
        line = json.dumps({"key": self._key(configuration, same), "row": row, "table": sums})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # the last line may lack its end

    def forget(self) -> None:
        """Remove the file."""
        self._found.clear()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _key(self, configuration: Configuration, same: Configuration | None) -> str:
        what = [asdict(configuration), None if same is None else asdict(same), self._shared]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
