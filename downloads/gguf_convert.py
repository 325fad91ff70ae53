"""GGUF to a standard Hugging Face folder: weights dequantized to bfloat16, config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig

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
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    _shortest_floats(model.config)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def _shortest_floats(config: PretrainedConfig) -> None:
    """GGUF keeps numbers in float32: 9.999999747378752e-06 was 1e-05 in the original config."""
    for name, value in vars(config).items():
        if isinstance(value, float):
            setattr(config, name, float(str(np.float32(value))))
