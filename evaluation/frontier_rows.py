"""Loss and speed of each point of a comparison, kept in a file row by row, so that a run that was stopped goes on."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.compared.files import ComparedFiles
from evaluation.methods import Configuration
from evaluation.perplexity_rows import PerplexityRows
from evaluation.speed.measure import Measurement
from transformers_patches.errors import PartInferError
from transformers_patches.files import write_text_atomic

FORMAT = "partinfer-frontier"
LOSS = ("nll", "nll_ci", "excess_nll", "excess_nll_ci", "kl_to_dense", "top1_agreement")
SIZES = ("block_bytes_fraction", "token_bytes", "weight_bytes_resident")
SPEED = ("peak_memory_bytes", "speedup_over_dense", "load_s", "time_to_first_token_s", "share_of_probe")


@dataclass(frozen=True)
class Point:
    """A configuration of this project, or a type of llama.cpp's."""

    label: str
    configuration: Configuration | None = None
    kind: str | None = None

    @property
    def line(self) -> str:
        """What it is drawn with: the same method and settings at other sparsities."""
        return " ".join(part for part in self.label.split() if not part.startswith("sparsity="))

    @property
    def identity(self) -> dict:
        """Two points are the same if these agree, and the conditions."""
        settings = self.configuration.settings.to_dict() if self.configuration else None
        return {"label": self.label, "settings": settings}


class RowFile:
    """Finished rows on disk. Raises PartInferError if the file holds rows that were measured otherwise."""

    def __init__(self, path: Path, conditions: dict) -> None:
        self.path, self.conditions = path, json.loads(json.dumps(conditions))
        self.rows: list[dict] = []
        if not path.is_file():
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT or content["conditions"] != self.conditions:
            was = content.get("conditions")
            raise PartInferError(
                f"{path} holds other measurements ({was}, now {self.conditions}): remove it, or give another --output"
            )
        self.rows = content["rows"]

    def find(self, point: Point) -> dict | None:
        """The row of a point, if it was measured before."""
        identity = json.loads(json.dumps(point.identity))
        return next((row for row in self.rows if {name: row[name] for name in identity} == identity), None)

    def put(self, point: Point, row: dict) -> None:
        self.rows = [other for other in self.rows if other["label"] != point.label]
        self.rows.append({**point.identity, "line": point.line, **row})
        content = {"format": FORMAT, "conditions": self.conditions, "rows": self.rows}
        write_text_atomic(self.path, json.dumps(content, indent=1, default=str) + "\n")


def measure_points(
    points: Sequence[Point],
    kept: RowFile,
    losses: PerplexityRows,
    measurement: Callable[[], Measurement],
    files: ComparedFiles | None,
) -> list[dict]:
    """The rows of all points in order; those that `kept` lacks are measured, the first point being dense.

    Each point's speed is measured in turn with the dense one's, because only rounds of one run can be compared.
    """
    missing = [point for point in points if kept.find(point) is None]
    dense = points[0]
    if missing and missing[0] is not dense:
        losses.row(dense.configuration)  # the others are compared to its logits
    for point in missing:
        if point.configuration is not None:
            loss = losses.row(point.configuration)
        else:
            loss = losses.compared_row(files.file(point.kind))
        pair = list(dict.fromkeys([dense.label, point.label]))
        grid = [p.configuration for p in points if p.label in pair and p.configuration is not None]
        timed = {row["label"]: row for row in measurement().rows(grid, False, [point.kind] if point.kind else [])}
        own = timed[point.label]
        kept.put(
            point,
            {
                "method": loss["method"],
                "dtype": own["dtype"],
                "note": loss.get("settings") if point.kind else None,
                **{name: loss[name] for name in (*LOSS, *SIZES)},
                **{name: own[name] for name in SPEED},
                "tokens_per_second_in_its_run": own["decode_tokens_per_second"],
                "dense_tokens_per_second": timed[dense.label]["decode_tokens_per_second"],
            },
        )
    return with_speeds([kept.find(point) for point in points])


def with_speeds(rows: Sequence[dict]) -> list[dict]:
    """Rows with `decode_tokens_per_second`: the dense model's median over all runs, times what each gained over it."""
    dense = statistics.median(row["dense_tokens_per_second"] for row in rows)
    return [{**row, "decode_tokens_per_second": row["speedup_over_dense"] * dense} for row in rows]


def speed_arguments(arguments: argparse.Namespace) -> argparse.Namespace:
    """The frontier's arguments as evaluate_speed.py has them."""
    return argparse.Namespace(**{**vars(arguments), "random_weights": None, "prompt": None, "batch_size": 1})
