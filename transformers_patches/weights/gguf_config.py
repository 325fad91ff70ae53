"""Config and tokenizer of a GGUF file, as the original model's folder has them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf import open_reader

# GGUF pre-tokenizers that set every digit apart, as the original tokenizer.json of these models does, and that
# transformers' GGUF reader leaves at plain GPT-2 splitting
DIGITS_ALONE = ("smollm",)
_QUANTIZATION = re.compile(r"[-._](?:Q\d+(?:_[0-9A-Z]+)*|IQ\d+_\w+|F16|BF16|F32)$", re.IGNORECASE)


def is_gguf(path: str | Path) -> bool:
    """Whether a checkpoint is one GGUF file."""
    return Path(path).suffix.lower() == ".gguf"


def gguf_model_name(path: str | Path) -> str:
    """The file's name without its ending and type: SmolLM2-135M-Instruct of SmolLM2-135M-Instruct-Q4_K_M.gguf."""
    return _QUANTIZATION.sub("", Path(path).stem)


def gguf_config(path: Path) -> PretrainedConfig:
    """The transformers config that the file's metadata stand for. PartInferError if transformers can't read them."""
    if not path.is_file():
        raise PartInferError(f"no model at {path}: fetch one with python download.py")
    reader = open_reader(path)  # damaged: said in one line
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise PartInferError(f"{path} can't be used: {str(error).splitlines()[0]}") from None
    vars(config).pop("_name_or_path", None)
    shortest_floats(config)
    head_dim = reader.get_field(f"{reader.get_field('general.architecture').contents()}.attention.key_length")
    if head_dim is not None:  # transformers does not take it from the files of every architecture
        config.head_dim = head_dim.contents()
    config.dtype = _float_type(reader)
    return config


def _float_type(reader: GGUFReader) -> torch.dtype:
    """The type that the file's matrices have, bfloat16 where they are quantised."""
    types = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    plain = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
    return plain.get(types.pop(), torch.bfloat16) if len(types) == 1 else torch.bfloat16


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    kind = open_reader(path).get_field("tokenizer.ggml.pre")
    if kind and kind.contents() in DIGITS_ALONE:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def shortest_floats(config: PretrainedConfig) -> None:
    """GGUF keeps numbers in float32: 9.999999747378752e-06 was 1e-05 in the original config."""
    for name, value in vars(config).items():
        if isinstance(value, float):
            setattr(config, name, float(str(np.float32(value))))
