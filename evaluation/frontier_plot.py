"""The figure of a frontier: loss against tokens/s, and against resident memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from transformers_patches.files import atomic_path

LINEAR_BELOW = 0.01  # nats; the loss axis is logarithmic above, so that 0 has a place
_AXES = {  # label of the axis -> a row's place on it
    "decoded tokens per second": lambda row: row["decode_tokens_per_second"],
    "peak resident memory, MB": lambda row: row["peak_memory_bytes"] / 1e6,
}


def plot_frontier(rows: Sequence[dict], title: str, path: Path) -> None:
    """One labelled line for each `line` of the rows, in both diagrams. The file's ending gives the format."""
    figure, both = plt.subplots(1, 2, figsize=(15, 7), sharey=True)
    lines = list(dict.fromkeys(row["line"] for row in rows))
    for axes, (name, place) in zip(both, _AXES.items(), strict=True):
        for number, line in enumerate(lines):
            own = sorted((row for row in rows if row["line"] == line), key=place)
            _draw(axes, [(place(row), row["excess_nll"]) for row in own], line, number)
        axes.set_xlabel(name)
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
        axes.grid(alpha=0.3)
    both[0].set_ylabel("loss over the dense checkpoint, nats per token")
    handles, labels = both[0].get_legend_handles_labels()
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.02 + 0.03 * (-(-len(lines) // 5)), 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=110)
    plt.close(figure)


def _draw(axes: Axes, points: list[tuple[float, float]], line: str, number: int) -> None:
    """A line with its name at its end; types of llama.cpp have squares, as they have one point each."""
    marker = "s" if line.startswith("llama.cpp") else "o"
    places, losses = zip(*points, strict=True)
    color = plt.get_cmap("tab20")(number % 20)
    axes.plot(places, losses, marker=marker, markersize=4, color=color, label=line)
    axes.annotate(line, points[-1], xytext=(4, 3), textcoords="offset points", fontsize=7, color=color)
