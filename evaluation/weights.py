"""How many weight bytes a model has loaded, and how many it reads for one decoded token."""

from __future__ import annotations

from transformers_patches.load.loaded_model import LoadedModel


def weight_counts(loaded: LoadedModel) -> dict:
    """Bytes and fractions of a loaded model.

    loaded_fraction: share of the sparse layers' neurons that is in memory
    ffn_bytes_fraction: share of those layers' FFN bytes that a decoded token reads, from the rows that decode passes
        have read since the counters were reset
    decoded_tokens, computed_neurons: what the counters have counted
    weight_bytes_read: bytes read from disk
    weight_bytes_dense: bytes of the whole checkpoint
    weight_bytes_resident: bytes in memory
    bytes_per_token: bytes read for one token, see LoadedModel.token_bytes
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
        "bytes_per_token": loaded.token_bytes(),
    }
