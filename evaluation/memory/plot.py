"""A figure of tokens/s against the limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from transformers_patches.files import atomic_path


def plot_limits(rows: Sequence[dict], title: str, path: Path) -> None:
    """A line for each method. The file's ending gives the format."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [
            (row["limit MB"], row["tokens/s"])
            for row in rows
            if row["method"] == method and isinstance(row["tokens/s"], float)
        ]
        axes.plot(*zip(*sorted(points), strict=True) if points else ([], []), marker="o", label=method)
    axes.set_xlabel("limit on the process, MB")
    axes.set_ylabel("decoded tokens per second, median")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=120)
    plt.close(figure)
