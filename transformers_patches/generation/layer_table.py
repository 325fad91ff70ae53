"""What decoding read in each layer, as a table for --verbose."""

from __future__ import annotations

from transformers_patches.cli import aligned
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.paths import layer_paths

HEADER = ("layer", "loaded", "neurons computed", "FFN bytes read", "computed by")


def layer_table(loaded: LoadedModel) -> str:
    """A line for each layer of the model: shares of its FFN, means over the tokens decoded since the last reset."""
    plan, state = loaded.plan, loaded.state
    paths = layer_paths(loaded.model, native=loaded.run.native)
    cells = dict.fromkeys(range(plan.num_layers), ("100%", "100%", "100%"))
    for number, layer in zip(plan.layers, state.layers, strict=True):
        size = plan.intermediate_size
        cells[number] = _shares(layer.counters, layer.rows.count / size, size, layer.rows.matrices)
    for number, experts in zip(plan.experts, state.experts, strict=True):
        cells[number] = _shares(experts.counters, 1.0, experts.neurons, experts.rows[0].matrices)
    lines = [(str(number), *cells[number], paths[number]) for number in range(plan.num_layers)]
    return aligned([HEADER, *lines])


def _shares(counters, loaded: float, neurons: int, matrices: int) -> tuple[str, str, str]:
    """Shares of all neurons of a layer. neurons: of a whole token; matrices: rows of weights of a neuron."""
    whole = counters.tokens * neurons
    if not whole:
        return f"{loaded:.0%}", "–", "–"
    return f"{loaded:.0%}", f"{counters.neurons / whole:.1%}", f"{counters.rows / (whole * matrices):.1%}"
