"""GGUF to a standard Hugging Face folder: weights dequantized to bfloat16, config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from transformers_patches.errors import PartInferError
from transformers_patches.load.meta_model import build_on_meta
from transformers_patches.weights.gguf import GGUFCheckpoint
from transformers_patches.weights.gguf_config import gguf_config
from transformers_patches.weights.gguf_tokenizer import gguf_tokenizer

MAX_SHARD_SIZE = "2GB"


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into a folder that from_pretrained loads without gguf_file.

    Raises PartInferError for a file that can't be read, or whose tensors are not those of its architecture.
    """
    config = gguf_config(gguf)
    config.dtype = torch.bfloat16
    model = build_on_meta(config, torch.bfloat16)
    _fill(model, GGUFCheckpoint(gguf))
    tokenizer = gguf_tokenizer(gguf)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def _fill(model: PreTrainedModel, weights: GGUFCheckpoint) -> None:
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    places = {name: place for name, place in model.state_dict().items() if name not in tied}
    if different := places.keys() ^ weights.names():
        raise PartInferError(f"{weights.source}: {min(different)} is not where {model.config.model_type} has it")
    values = {}
    for name, place in places.items():
        if weights.shape(name) != tuple(place.shape):
            raise PartInferError(
                f"{weights.source}: {name} is {list(weights.shape(name))}, expected {list(place.shape)}"
            )
        values[name] = torch.empty(place.shape, dtype=place.dtype)
        weights.read_into(name, values[name])
    model.load_state_dict(values, assign=True, strict=False)
    model.tie_weights()
