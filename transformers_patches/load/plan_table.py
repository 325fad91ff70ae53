"""What a bound on memory could be used for: one row for each share of the FFN bytes that a token may read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import resolve_files
from transformers_patches.load.memory_plan import memory_needs, within_memory
from transformers_patches.neurons.loss_curve import ALL
from transformers_patches.plan.memory import MB
from transformers_patches.weights.disk_probe import disk_bandwidth
from transformers_patches.weights.model_files import load_tokenizer
from transformers_patches.weights.safetensors_folder import Checkpoint

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the FFN bytes, beside the one that is chosen
PROBE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PlanRow:
    """One setting. MB are millions of bytes.

    sparsity: share of the FFN bytes that a token reads.
    resident: share of the rows of gate and down in memory.
    memory_mb: of the whole process.
    token_memory_mb, token_disk_mb: read for a token; from disk at most, if no row that is chosen is in the cache and all
        rows between them are read as well.
    tokens_per_second: predicted from these and from what memory and disk were measured to give.
    loss: predicted, nats per token over dense; None: not measured.
    """

    dtype: str
    sparsity: float
    resident: float
    memory_mb: float
    token_memory_mb: float
    token_disk_mb: float
    tokens_per_second: float | None
    loss: float | None
    chosen: bool


def plan_rows(folder: Path, settings: PartInferConfig) -> list[PlanRow]:
    """The rows for a model and its settings; PartInferError if nothing fits."""
    tokenizer = load_tokenizer(folder)  # which a run holds when it plans: it is a part of the runtime
    run, weights = resolve_files(folder, settings)
    needs = memory_needs(run, weights)
    run = within_memory(run, weights)
    del tokenizer
    resident = 1.0 if run.resident is None else run.resident
    memory = kernels.bandwidth_probe(PROBE_BYTES, 4)
    disk = None
    if resident < 1 and isinstance(weights, Checkpoint):
        disk = disk_bandwidth(max(weights.folder.glob("*.safetensors"), key=lambda path: path.stat().st_size))
    curve = None if run.base is None else run.base.loss
    rows = []
    for share in sorted({*SHARES, run.settings.sparsity}, reverse=True):
        chosen_rows = max(0.0, (3 * share - 1) / 2)  # of gate and down: up is read whole
        from_memory = needs.fixed + chosen_rows * needs.neurons
        from_disk = (1 - resident) * needs.neurons if chosen_rows else 0.0
        seconds = from_memory / memory + (from_disk / disk if disk else 0.0)
        loss = 0.0 if share == 1 else None if curve is None else curve.predict("up", ALL, 1.0, share)
        used = needs.least + resident * needs.neurons if resident < 1 else needs.most
        known = disk is not None or not from_disk
        rows.append(
            PlanRow(
                run.settings.dtype,
                share,
                resident,
                used / MB,
                from_memory / MB,
                from_disk / MB,
                1 / seconds if known else None,
                loss,
                share == run.settings.sparsity,
            )
        )
    return rows


def as_text(rows: list[PlanRow]) -> str:
    """The rows as a table; the chosen one has a star."""
    titles = (
        "",
        "dtype",
        "FFN bytes",
        "resident",
        "process MB",
        "MB/token memory",
        "MB/token disk",
        "tokens/s",
        "loss",
    )
    lines = [titles]
    for row in rows:
        speed = "?" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}"
        loss = "?" if row.loss is None else f"{row.loss:.3f}"
        sizes = (f"{row.memory_mb:.0f}", f"{row.token_memory_mb:.0f}", f"{row.token_disk_mb:.0f}")
        share, resident = f"{row.sparsity:.2f}", f"{row.resident:.1%}"
        lines.append(("*" if row.chosen else "", row.dtype, share, resident, *sizes, speed, loss))
    widths = [max(len(line[place]) for line in lines) for place in range(len(titles))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def as_json(rows: list[PlanRow]) -> dict:
    """The rows as one JSON object."""
    return {"settings": [asdict(row) for row in rows]}
