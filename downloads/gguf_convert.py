"""GGUF to a standard Hugging Face folder: weights dequantized to bfloat16, config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig

MAX_SHARD_SIZE = "2GB"
# GGUF pre-tokenizers that set every digit apart, as the original tokenizer.json of these models does, and that
# transformers' GGUF reader leaves at plain GPT-2 splitting
DIGITS_ALONE = ("smollm",)


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
    _shortest_floats(model.config)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    if _pre_tokenizer(gguf) in DIGITS_ALONE:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def _pre_tokenizer(gguf: Path) -> str | None:
    """The name that llama.cpp gives to how a vocabulary's text is split before its merges."""
    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    return field.contents() if field else None


def _shortest_floats(config: PretrainedConfig) -> None:
    """GGUF keeps numbers in float32: 9.999999747378752e-06 was 1e-05 in the original config."""
    for name, value in vars(config).items():
        if isinstance(value, float):
            setattr(config, name, float(str(np.float32(value))))
