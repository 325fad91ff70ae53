"""The figures of `show` and `compare`. Colours are matplotlib's perceptually even, colour-blind safe maps."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from transformers_patches.files import atomic_path


def plot_overlap(matrix: torch.Tensor, names: list[str], fraction: float, chance: float, path: Path) -> None:
    """A heat map of mean overlaps [files, files] in per cent; chance is marked on the colour bar."""
    size = max(4.5, 0.85 * len(names) + 2.2)
    figure = Figure(figsize=(size + 1.0, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * matrix.numpy(), cmap="cividis", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for row in range(len(names)):
        for column in range(len(names)):
            value = 100 * float(matrix[row, column])
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value < 55 else "black")
    axes.set_title(
        f"Overlap of the top {100 * fraction:g} % of FFN neurons\n(mean over layers, %; chance {100 * chance:.0f} %)"
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.85, label="overlap (%)")
    bar.ax.axhline(100 * chance, color="white", linewidth=2, linestyle="--")
    bar.ax.text(0.5, 100 * chance + 1.5, "chance", color="white", ha="center", va="bottom", fontsize=7)
    _write(figure, path)


def plot_concentration(curves: torch.Tensor, title: str, path: Path) -> None:
    """Concentration curves [layers, N], one line per layer coloured by depth, against an even spread."""
    layers, size = curves.shape
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colormaps["viridis"]
    share = 100 * torch.arange(size + 1).numpy() / size
    percent = torch.nn.functional.pad(100 * curves, (1, 0)).numpy()  # no neurons hold nothing
    for layer in range(layers):
        axes.plot(share, percent[layer], color=colours(layer / max(1, layers - 1)), linewidth=1)
    axes.plot(share, percent.mean(0), color="black", linewidth=2, label="mean of the layers")
    axes.plot([0, 100], [0, 100], color="grey", linewidth=1.5, linestyle="--", label="even spread")
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="neurons, best first (%)", ylabel="share of the activation mass (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    depth = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, max(1, layers - 1)), colours)
    figure.colorbar(depth, ax=axes, label="layer")
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)
