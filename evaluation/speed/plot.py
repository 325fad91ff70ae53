"""A figure of a speed measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from transformers_patches.files import atomic_path


def plot_speeds(rows: Sequence[dict], title: str, path: Path) -> None:
    """Bars of the median decode speed with the range of the repetitions. The file's ending gives the format."""
    figure, axes = plt.subplots(figsize=(8, 1 + 0.5 * len(rows)))
    medians = [row["decode_tokens_per_second"] for row in rows]
    ends = ("decode_tokens_per_second_min", "decode_tokens_per_second_max")
    errors = [[abs(row[end] - row["decode_tokens_per_second"]) for row in rows] for end in ends]
    axes.barh([row["label"] for row in rows], medians, xerr=errors, capsize=3, color="tab:blue")
    axes.invert_yaxis()
    axes.set_xlabel("decoded tokens per second: median, range of the repetitions")
    axes.set_title(title)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=120)
    plt.close(figure)
