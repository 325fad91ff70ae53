"""How many weight bytes a model has loaded, and how many it reads for one decoded token."""

from __future__ import annotations

from transformers_patches.families import family_of
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.modules.quantized import weight_bytes
from transformers_patches.modules.screened_head import ScreenedHead


def weight_counts(loaded: LoadedModel) -> dict:
    """Bytes and fractions of a loaded model.

    loaded_fraction: share of the sparse layers' neurons that is in memory
    ffn_bytes_fraction: share of those layers' FFN bytes that a decoded token reads, from the rows that decode passes
        have read since the counters were reset
    decoded_tokens, computed_neurons: what the counters have counted
    weight_bytes_read: bytes read from disk
    weight_bytes_dense: bytes of the whole checkpoint
    weight_bytes_resident: bytes in memory
    token_bytes: bytes read for one token, see LoadedModel.token_bytes
    block_bytes_fraction: see there
    """
    layers = [*loaded.state.layers, *loaded.state.experts]
    tokens = layers[0].counters.tokens if layers else 0
    return {
        "loaded_fraction": loaded.plan.loaded_fraction,
        "ffn_bytes_fraction": loaded.bytes_fraction(),
        "decoded_tokens": tokens if loaded.masked is None else loaded.masked.decoded_tokens(),
        "computed_neurons": sum(layer.counters.neurons for layer in layers),
        "weight_bytes_read": loaded.report.bytes_read,
        "weight_bytes_dense": loaded.report.bytes_dense,
        "weight_bytes_resident": loaded.report.bytes_resident,
        "token_bytes": loaded.token_bytes(),
        "block_bytes_fraction": block_bytes_fraction(loaded),
    }


def block_bytes_fraction(loaded: LoadedModel) -> float:
    """Weight bytes of all decoder layers that a decoded token reads, over those of the whole layers in the same format.

    Attention and FFNs of all layers count, sparse or not; the embeddings and the lm_head do not. Of experts those count
    that a token's router chooses.
    """
    model = loaded.model
    in_memory = weight_bytes(family_of(model.config).decoder_layers(model))
    head = model.get_output_embeddings()
    beside = loaded.whole_token_bytes() + loaded.unchosen_expert_bytes() - in_memory
    if isinstance(head, ScreenedHead):
        beside -= head.unread_bytes()
    left_out = sum(
        layer.rows.row_bytes * (loaded.plan.intermediate_size / layer.rows.count - 1) for layer in loaded.state.layers
    )
    return (loaded.token_bytes() - beside) / (in_memory - loaded.unchosen_expert_bytes() + left_out)
