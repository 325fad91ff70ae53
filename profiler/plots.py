"""The figures of `show` and `compare`, in matplotlib's perceptually uniform, colour-blind safe maps."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from transformers_patches.errors import PartInferError
from transformers_patches.files import atomic_path

ENDINGS = (".png", ".pdf", ".svg")


def plot_overlap(matrix: torch.Tensor, names: list[str], fraction: float, chance: float, path: Path) -> None:
    """A heat map of mean overlaps [files, files] in per cent; the colour scale starts at chance."""
    size = max(4.5, 0.85 * len(names) + 2.2)
    figure = Figure(figsize=(size + 1.0, size), layout="constrained")
    axes = figure.subplots()
    lowest = min(100 * chance, 95.0)  # with all neurons compared, chance is 100 too
    image = axes.imshow(100 * matrix.numpy(), cmap="cividis", vmin=lowest, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for row in range(len(names)):
        for column in range(len(names)):
            value = 100 * float(matrix[row, column])
            colour = "white" if value < (lowest + 100) / 2 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set_title(
        f"Overlap of the top {100 * fraction:g} % of FFN neurons\n(mean over layers, %; chance {100 * chance:.0f} %)"
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.85, label="overlap (%)")
    bar.ax.set_xlabel("chance", fontsize="small")
    _write(figure, path)


def plot_concentration(curves: torch.Tensor, title: str, path: Path) -> None:
    """Concentration curves [layers, N]: one line per layer, coloured by depth, with an even spread for comparison."""
    layers, size = curves.shape
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colormaps["viridis"]
    share = 100 * torch.arange(size + 1).numpy() / size
    percent = torch.nn.functional.pad(100 * curves, (1, 0)).numpy()  # 0 neurons hold 0 %
    for layer in range(layers):
        axes.plot(share, percent[layer], color=colours(layer / max(1, layers - 1)), linewidth=1)
    place = size // 5  # where the curves are far apart
    for layer in most_concentrated(curves):
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
        at = {"ha": "center", "va": "center", "fontsize": "small"}
        axes.text(share[place], percent[layer, place], f"layer {layer}", bbox=box, **at)
    axes.plot(share, percent.mean(0), color="black", linewidth=2, label="mean of the layers")
    axes.plot([0, 100], [0, 100], color="grey", linewidth=1.5, linestyle="--", label="even spread")
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="neurons, best first (%)", ylabel="share of the activation mass (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    depth = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, max(1, layers - 1)), colours)
    figure.colorbar(depth, ax=axes, label="layer")
    _write(figure, path)


def most_concentrated(curves: torch.Tensor) -> list[int]:
    """At most three layers whose best tenth holds more than a standard deviation above the mean of all layers."""
    tenth = curves[:, curves.shape[1] // 10]
    order = tenth.argsort(descending=True)[:3].tolist()
    return [layer for layer in order if len(tenth) > 1 and tenth[layer] > tenth.mean() + tenth.std()]


def _write(figure: Figure, path: Path) -> None:
    if path.suffix not in ENDINGS:
        raise PartInferError(f"--plot {path}: expected a name that ends in {', '.join(ENDINGS)}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip("."), dpi=110)
