"""Figures of a report: scores relative to dense, and quality against weight bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluation.methods import METHODS
from transformers_patches.files import atomic_path

_PALETTE = ("black", *matplotlib.color_sequences["tab10"])
_COLORS = {method: _PALETTE[i % len(_PALETTE)] for i, method in enumerate(METHODS)}
_MARKERS = "os^Dv"  # for the variants of one method
_SIZES = {"loaded_bytes_fraction": "weight bytes in memory", "token_bytes_fraction": "weight bytes read per token"}


def relative_scores(rows: list[dict], model: str, path: Path) -> None:
    """Bars of each task's score relative to dense, by configuration, with standard errors.

    rows: those of task_rows for one model
    """
    rows = [row for row in rows if row["relative"] is not None and row["configuration"] != "dense"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    configurations = list(dict.fromkeys(row["configuration"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(6, 1.6 * len(tasks)), 4.5))
    width = 0.8 / max(1, len(configurations))
    for place, configuration in enumerate(configurations):
        mine = {row["task"]: row for row in rows if row["configuration"] == configuration}
        offsets = [i + (place - (len(configurations) - 1) / 2) * width for i, task in enumerate(tasks) if task in mine]
        heights = [mine[task]["relative"] for task in tasks if task in mine]
        errors = [_relative_error(mine[task]) for task in tasks if task in mine]
        color = _COLORS[next(iter(mine.values()))["method"]] if len(configurations) <= len(METHODS) else None
        bar = {"linewidth": 0.8, "ecolor": "dimgray"}
        axes.bar(offsets, heights, width, label=configuration, color=color, yerr=errors, error_kw=bar)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axes.set_ylabel("score relative to dense")
    axes.set_ylim(bottom=0)
    axes.set_title(model)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def _relative_error(row: dict) -> float:
    """The standard error of a score on the scale of `relative`, without that of the dense score."""
    return row["stderr"] / row["score"] * row["relative"] if row["stderr"] and row["score"] else 0.0


def trade_off(rows: list[dict], quality: str, label: str, model: str, path: Path) -> None:
    """Two panels: a quality against the weight bytes in memory, and against those read per token.

    rows: need `method`, `configuration`, the quality, and the fractions of dense bytes
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for panel, (size, name) in zip(panels, _SIZES.items(), strict=True):
        for method in METHODS:
            known = [row for row in rows if row["method"] == method and None not in (row[size], row[quality])]
            for place, series in enumerate(dict.fromkeys(_series(row) for row in known)):
                mine = sorted((row for row in known if _series(row) == series), key=lambda row: row[size])
                values = [[row[key] for row in mine] for key in (size, quality)]
                marker = _MARKERS[place % len(_MARKERS)]
                panel.plot(*values, f"{marker}-", color=_COLORS[method], label=series)
        panel.set_xlabel(f"{name}, relative to dense")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    panels[1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(model)
    _save(figure, path)


def _series(row: dict) -> str:
    """The name of a line: the configuration without the fractions that were swept."""
    parts = row["configuration"].split(" ")
    return " ".join(part for part in parts if not part.rpartition("=")[2].replace(".", "", 1).isdigit())


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    with atomic_path(path) as temporary:
        # without matplotlib's version, so that the same numbers give the same file
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
