"""GGUF to a standard Hugging Face folder: weights dequantized to bfloat16, config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from transformers_patches.weights.gguf_config import gguf_tokenizer, shortest_floats

MAX_SHARD_SIZE = "2GB"


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into a folder that from_pretrained loads without gguf_file."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    # transformers refuses to save a model that was loaded from GGUF, though its weights are plain by now
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    vars(model.config).pop("_model_name_or_path", None)
    shortest_floats(model.config)
    tokenizer = gguf_tokenizer(gguf)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)
