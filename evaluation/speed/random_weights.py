"""Random weights in real shapes, so that speed and memory can be measured if a model's weights are not available."""

from __future__ import annotations

import zlib

import torch
from transformers import LlamaConfig, OPTConfig, PretrainedConfig, Qwen2Config

from transformers_patches.errors import PartInferError
from transformers_patches.load.meta_model import build_on_meta
from transformers_patches.weights.model_files import read_config
from transformers_patches.weights.source import Source, WeightSource, largest_in_columns

BLOCK = 2**22  # values that are drawn; tensors repeat them, each from another place

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama3(hidden: int, layers: int, intermediate: int, heads: int, tied: bool, head_dim: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=dict(_LLAMA3_ROPE),
        tie_word_embeddings=tied,
        bos_token_id=128000,
        eos_token_id=128001,
        dtype="bfloat16",
    )


def _opt(hidden: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        ffn_dim=4 * hidden,
        num_attention_heads=heads,
        dtype="float16",
    )


SHAPES = {  # as the models' own config.json files say
    "smollm2-135m": lambda: LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    ),
    "llama3-1b": lambda: _llama3(2048, 16, 8192, 32, tied=True, head_dim=64),
    "llama3-3b": lambda: _llama3(3072, 28, 8192, 24, tied=True, head_dim=128),
    "llama3-8b": lambda: _llama3(4096, 32, 14336, 32, tied=False, head_dim=128),
    "qwen2.5-1.5b": lambda: Qwen2Config(
        hidden_size=1536,
        num_hidden_layers=28,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "opt-6.7b": lambda: _opt(4096, 32, 32),
}


def shape_config(name: str) -> PretrainedConfig:
    """The config of a known shape, or of a folder or file with a config.json."""
    if name in SHAPES:
        return SHAPES[name]()
    folder = name.removesuffix("config.json") or "."
    try:
        return read_config(folder)
    except PartInferError:
        raise PartInferError(
            f"unknown shape {name!r}: expected {', '.join(SHAPES)}, or the path of a config.json"
        ) from None


class RandomWeights(WeightSource):
    """A checkpoint that is drawn instead of read: a WeightSource for `load_from`. Nothing comes from disk.

    scale: standard deviation of the weights, norms are 1 plus that. A tensor read whole is the same each time.
    """

    bytes_read = 0

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, seed: int = 0, scale: float = 0.02) -> None:
        self.source = "random weights"
        generator = torch.Generator().manual_seed(seed)
        self._block = (torch.randn(BLOCK, generator=generator) * scale).to(dtype)
        model = build_on_meta(config, dtype)
        tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
        self._shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if n not in tied}

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._block.dtype

    def total_bytes(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes.values()) * self._block.element_size()

    def read_into(self, name: str, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Fill `out`; rows only say how many there are."""
        self._fill(name, out)
        if out.ndim == 1 and name.endswith("weight"):
            out += 1  # a norm

    def read_columns_into(self, source: Source, out: torch.Tensor) -> None:
        """Fill `out`. Columns that are not kept have no values, so there is no sum of them."""
        self._fill(source.name, out)
        if source.largest is not None:
            source.largest.copy_(largest_in_columns(out))

    def _fill(self, name: str, out: torch.Tensor) -> None:
        flat = out.view(-1) if out.is_contiguous() else torch.empty(out.numel(), dtype=out.dtype)
        place = zlib.crc32(name.encode())
        for number, start in enumerate(range(0, len(flat), BLOCK)):
            part = flat[start : start + BLOCK]
            shift = (place + number * 7919) % BLOCK
            first = min(len(part), BLOCK - shift)
            part[:first].copy_(self._block[shift : shift + first])
            part[first:].copy_(self._block[: len(part) - first])
        if not out.is_contiguous():
            out.copy_(flat.view(out.shape))
