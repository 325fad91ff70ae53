"""How many weight bytes a model has loaded and reads for one decoded token, with the neurons that were counted."""

from __future__ import annotations

from transformers_patches.loading import LoadedModel


def weight_counts(loaded: LoadedModel) -> dict:
    """Bytes and fractions of a loaded model.

    ffn_bytes_fraction: share of the sparse layers' FFN bytes read per decoded token, from the neurons that decode
    passes computed since the counters were reset; loaded_fraction: share of those layers' neurons that is in memory;
    weight_bytes_read, weight_bytes_dense: read from disk, and what the whole checkpoint holds; bytes_per_token: weight
    bytes read for one token, in the resident type (an input embedding that is not also the output is one row, so
    not counted).
    """
    layers = loaded.state.layers
    return {
        "loaded_fraction": loaded.plan.loaded_fraction,
        "ffn_bytes_fraction": loaded.computed_fraction(),
        "decoded_tokens": layers[0].decoded_tokens if layers else 0,
        "computed_neurons": sum(layer.computed_neurons for layer in layers),
        "weight_bytes_read": loaded.report.bytes_read,
        "weight_bytes_dense": loaded.report.bytes_dense,
        "weight_bytes_resident": loaded.report.bytes_resident,
        "bytes_per_token": _bytes_per_token(loaded),
    }


def _bytes_per_token(loaded: LoadedModel) -> int:
    model = loaded.model
    total = loaded.report.bytes_resident
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:
        total -= embedding.nbytes
    sparse = sum(layer.row_bytes for layer in loaded.state.layers)
    skipped = 1 - loaded.computed_fraction() / loaded.plan.loaded_fraction
    return round(total - sparse * skipped)
