"""What decoding reads: per token and layer, and for a whole answer."""

from __future__ import annotations

import resource
import time
from pathlib import Path

from transformers_patches.generation.generate import GenerationResult
from transformers_patches.load.loaded_model import LoadedModel

STATM = Path("/proc/self/statm")
DIGITS = 4


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not say."""
    try:
        return int(STATM.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return None


class Reading:
    """Watches the counters of one answer; `token` is called after each of its tokens."""

    def __init__(self, loaded: LoadedModel) -> None:
        plan, state = loaded.plan, loaded.state
        self._loaded, self._first, self._tokens = loaded, 0.0, 0
        # number of a sparse layer, what counts its rows, and the rows of a whole token
        self._layers = [
            (number, layer, layer.rows.matrices * plan.intermediate_size)
            for number, layer in zip(plan.layers, state.layers, strict=True)
        ]
        self._layers += [
            (number, experts, experts.rows[0].matrices * experts.neurons)
            for number, experts in zip(plan.experts, state.experts, strict=True)
        ]
        self._rows = [0] * len(self._layers)

    def token(self) -> dict:
        """What was read for the token that has just been chosen.

        layers: for each layer of the model, the share of its FFN's bytes; 1 where it is computed whole, and for the
        first token, which the prompt's pass gives.
        """
        loaded, now = self._loaded, time.perf_counter()
        self._tokens += 1
        if self._tokens == 1:
            self._first = now
        shares = [1.0] * loaded.plan.num_layers
        for place, (number, counting, whole) in enumerate(self._layers):
            rows = counting.counters.rows
            read, self._rows[place] = rows - self._rows[place], rows
            if self._tokens > 1:
                shares[number] = round(read / whole, DIGITS)
        speed = (self._tokens - 1) / (now - self._first) if self._tokens > 1 else None
        return {
            "layers": shares,
            "token": self._tokens,
            "tokens_per_second": None if speed is None else round(speed, 2),
            "bytes_per_token": loaded.token_bytes(),
            "resident_bytes": resident_bytes(),
        }


def summary(loaded: LoadedModel, result: GenerationResult) -> dict:
    """What a whole answer took, as counted."""
    settings = loaded.settings
    return {
        "method": settings.method,
        "max_loss": settings.max_loss,
        "predicted_loss": loaded.run.predicted_loss,
        "ffn_bytes_share": loaded.bytes_fraction(),
        "neurons_share": loaded.computed_fraction(),
        "bytes_per_token": loaded.token_bytes(),
        "tokens_per_second": result.decode_tokens_per_second,
        "time_to_first_token_s": result.time_to_first_token_s,
        "weight_bytes_resident": loaded.report.bytes_resident,
        "resident_bytes": resident_bytes(),
    }
