"""How many weight bytes a model has loaded, and how many it reads for one decoded token."""

from __future__ import annotations

from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.modules.screened_head import ScreenedHead
from transformers_patches.sparse.request import RequestLayer


def weight_counts(loaded: LoadedModel) -> dict:
    """Bytes and fractions of a loaded model.

    loaded_fraction: share of the sparse layers' neurons that is in memory
    ffn_bytes_fraction: share of those layers' FFN bytes that a decoded token reads, from the rows that decode passes
        have read since the counters were reset
    decoded_tokens, computed_neurons: what the counters have counted
    weight_bytes_read: bytes read from disk
    weight_bytes_dense: bytes of the whole checkpoint
    weight_bytes_resident: bytes in memory
    bytes_per_token: bytes read for one token. An input embedding that is not also the output layer is left out, since a
        token reads one row of it. A screened head counts with what decoded tokens read on average.
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
    """Share of a layer's stored rows that a decoded token has read on average; 1 if nothing was decoded."""
    if not layer.counters.tokens:
        return 1.0
    rows = layer.counters.rows / layer.counters.tokens
    return rows / (layer.rows.count * layer.rows.matrices)
