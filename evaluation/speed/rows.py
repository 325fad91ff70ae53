"""Turns the timings of interleaved runs into the rows of the result."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from evaluation.speed.job import Timing

COLUMNS = (
    *("label", "method", "model", "dtype", "sparsity", "loaded_neurons_percent", "computed_neurons_percent"),
    *("neurons_per_layer_and_token", "sparse_layers", "decode_tokens_per_second", "decode_tokens_per_second_min"),
    *("decode_tokens_per_second_max", "prefill_tokens_per_second", "time_to_first_token_s", "load_s"),
    *("selection_s", "selection_share_of_prefill"),
    *("weight_bytes_resident", "weight_bytes_per_token", "gigabytes_per_second", "probe_gigabytes_per_second"),
    *("share_of_probe", "peak_memory_bytes", "speedup_over_dense", "batch_size", "prompt_length", "new_tokens"),
    *("repetitions", "threads", "settings"),
)
_TABLE = {  # heading -> a row's cell
    "": lambda r: r["label"],
    "dtype": lambda r: r["dtype"],
    "loaded": lambda r: f"{r['loaded_neurons_percent']:.0%}",
    "computed": lambda r: f"{r['computed_neurons_percent']:.0%}",
    "GB held": lambda r: f"{r['weight_bytes_resident'] / 1e9:.2f}",
    "GB/token": lambda r: f"{r['weight_bytes_per_token'] / 1e9:.3f}",
    "load s": lambda r: f"{r['load_s']:.2f}",
    "first token s": lambda r: f"{r['time_to_first_token_s']:.3f}",
    "choosing": lambda r: _optional(r["selection_share_of_prefill"], ".1%"),
    "prefill tok/s": lambda r: f"{r['prefill_tokens_per_second']:.0f}",
    "decode tok/s (min to max)": lambda r: (
        f"**{r['decode_tokens_per_second']:.2f}** ({r['decode_tokens_per_second_min']:.2f} to "
        f"{r['decode_tokens_per_second_max']:.2f})"
    ),
    "GB/s": lambda r: _optional(r["gigabytes_per_second"], ".1f"),
    "of probe": lambda r: _optional(r["share_of_probe"], ".0%"),
    "peak GB": lambda r: f"{r['peak_memory_bytes'] / 1e9:.2f}",
    "× dense": lambda r: _optional(r["speedup_over_dense"], ".2f"),
}


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def measured_row(timings: Sequence[Timing], facts: dict, probe: float, batch: int, prompt_length: int) -> dict:
    """Medians over the repetitions.

    Tokens per second count all sequences of the batch. Bytes per second are given for a single sequence only, because
    the sequences of a batch read different neurons.

    facts: those of the engine
    probe: memory bandwidth in bytes per second
    """
    decode = [timing.decode_steps_per_second * batch for timing in timings]
    first = statistics.median(timing.first_token_s for timing in timings)
    speed = statistics.median(decode)
    selection = facts.get("selection_s")
    reached = speed * facts["weight_bytes_per_token"] if batch == 1 else None
    return {
        "decode_tokens_per_second": speed,
        "decode_tokens_per_second_min": min(decode),
        "decode_tokens_per_second_max": max(decode),
        "prefill_tokens_per_second": batch * prompt_length / first,
        "time_to_first_token_s": first,
        "selection_share_of_prefill": None if selection is None else selection / first,
        "gigabytes_per_second": None if reached is None else reached / 1e9,
        "probe_gigabytes_per_second": probe / 1e9,
        "share_of_probe": None if reached is None else reached / probe,
        **facts,
    }


def speedup(timings: Sequence[Timing], dense: Sequence[Timing] | None) -> float | None:
    """The median of this row's decode speed divided by the dense model's in the same round."""
    if dense is None:
        return None
    pairs = zip(timings, dense, strict=True)
    return statistics.median(ours.decode_steps_per_second / other.decode_steps_per_second for ours, other in pairs)


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| {' | '.join(_TABLE)} |", f"|{'---|' * len(_TABLE)}"]
    lines += [f"| {' | '.join(cell(row) for cell in _TABLE.values())} |" for row in rows]
    return "\n".join(lines)
