"""How tokens are chosen and when an answer ends. Checked before torch is imported, which takes longer than the check."""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers_patches.errors import PartInferError

if TYPE_CHECKING:
    from transformers import GenerationConfig

LOWEST_TEMPERATURE = 1e-6
DEFAULT_LENGTH = 128  # tokens of an answer at most


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen and when generation ends. Raises PartInferError for values out of range."""

    max_new_tokens: int = 128  # length of the answer at most
    sampling: str = "greedy"  # greedy or top-p
    temperature: float = 1.0  # logits are divided by it; top-p sampling only
    top_p: float = 0.9  # probability mass of the tokens that are drawn from; top-p sampling only
    top_k: int = 0  # number of tokens that are drawn from; 0: no limit; top-p sampling only
    stop: tuple[str, ...] = ()  # texts that end the answer

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise PartInferError(f"num_tokens_to_generate must be at least 1, got {self.max_new_tokens}")
        if self.sampling not in ("greedy", "top-p"):
            raise PartInferError(f"sampling-method must be greedy or top-p, got {self.sampling!r}")
        if self.temperature <= 0:
            raise PartInferError(
                f"temperature must be above 0, got {self.temperature}: greedy is --sampling-method greedy"
            )
        if not math.isfinite(self.temperature):
            raise PartInferError(f"temperature must be a number, got {self.temperature}")
        if self.temperature < LOWEST_TEMPERATURE:  # logits divided by it would overflow
            raise PartInferError(
                f"temperature must be at least {LOWEST_TEMPERATURE}, got {self.temperature}: greedy is --sampling-method greedy"
            )
        if not 0 < self.top_p <= 1:
            raise PartInferError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise PartInferError(f"top_k must be 0 (no limit) or more, got {self.top_k}")
        if "" in self.stop:
            raise PartInferError("stop must be a text, got an empty one")

    def generation_config(self, base: GenerationConfig) -> GenerationConfig:
        """The model's own generation config (its end tokens above all) with these choices."""
        config = copy.deepcopy(base)
        sampled = self.sampling == "top-p"
        config.do_sample = sampled
        config.temperature = self.temperature if sampled else None
        config.top_p = self.top_p if sampled else None
        config.top_k = self.top_k if sampled else None
        config.max_length, config.max_new_tokens = None, self.max_new_tokens
        return config


def generation_options(arguments: argparse.Namespace) -> GenerationOptions:
    """The options in parsed arguments; PartInferError if they are out of range."""
    length = arguments.num_tokens_to_generate
    return GenerationOptions(
        max_new_tokens=DEFAULT_LENGTH if length is None else length,
        sampling=arguments.sampling_method,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        stop=tuple(arguments.stop),
    )
