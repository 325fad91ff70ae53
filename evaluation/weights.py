"""How many weight bytes a model has loaded and reads for one decoded token, with the neurons that were counted."""

from __future__ import annotations

from transformers_patches.load.loader import LoadedModel
from transformers_patches.modules.screened_head import ScreenedHead
from transformers_patches.sparse.request import RequestLayer


def weight_counts(loaded: LoadedModel) -> dict:
    """Bytes and fractions of a loaded model.

    ffn_bytes_fraction: share of the sparse layers' FFN bytes read per decoded token, from the rows that decode passes
    read since the counters were reset; loaded_fraction: share of those layers' neurons that is in memory;
    weight_bytes_read, weight_bytes_dense: read from disk, and what the whole checkpoint holds; bytes_per_token: weight
    bytes read for one token, in the resident type (an input embedding that is not also the output is one row, so
    not counted; of a screened head what decoded tokens read on average).
    """
    layers = loaded.state.layers
    return {
        "loaded_fraction": loaded.plan.loaded_fraction,
        "ffn_bytes_fraction": loaded.bytes_fraction(),
        "decoded_tokens": layers[0].counters.tokens if layers else 0,
        "computed_neurons": sum(layer.counters.neurons for layer in layers),
        "weight_bytes_read": loaded.report.bytes_read,
        "weight_bytes_dense": loaded.report.bytes_dense,
        "weight_bytes_resident": loaded.report.bytes_resident,
        "bytes_per_token": _bytes_per_token(loaded),
    }


def _bytes_per_token(loaded: LoadedModel) -> int:
    model = loaded.model
    total = loaded.report.bytes_resident
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if embedding is not head.weight:
        total -= embedding.nbytes
    skipped = sum(layer.rows.row_bytes * (1 - _read_share(layer)) for layer in loaded.state.layers)
    if isinstance(head, ScreenedHead):
        skipped += head.unread_bytes()
    return round(total - skipped)


def _read_share(layer: RequestLayer) -> float:
    """Share of a layer's stored rows that decoding a token read on average; 1 if nothing was decoded."""
    if not layer.counters.tokens:
        return 1.0
    rows = layer.counters.rows / layer.counters.tokens
    return rows / (layer.rows.count * layer.rows.matrices)
