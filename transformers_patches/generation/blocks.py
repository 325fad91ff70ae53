"""A prompt is prefilled in blocks, whose ends depend on nothing but their place.

A matrix product over other rows may round in another way, so that a prompt prefilled in one pass and in two may differ
in the last bits. With fixed ends every pass is the same for all prompts that begin alike: what one has prefilled up to a
block's end, another can go on from, and its tokens are those that it would have without (prefixes.py).

Blocks of fewer tokens take more time in all: a prompt of 1,100 tokens up to a third more than in one pass, one of 110
with an end after 23 an eighth (measured). So below 128 tokens there is one end, where prompts are most often alike: after
the first turn, which is the system prompt of most chats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import Cache, PreTrainedModel

FIRST, BLOCK = 128, 256  # tokens: the end of a block, and what later ends are multiples of
FEWEST = 16  # tokens of a first turn, for which a pass of their own pays when they come again


def turn_end(model: PreTrainedModel, ids: Sequence[int]) -> int | None:
    """How many tokens the first turn of a prompt has, with the token that ends it; None if it has none in 16 to 127.

    ids: of a prompt, or of its beginning. Turns end with the tokens that end the model's answers.
    """
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return next((at for at, token in enumerate(ids[: FIRST - 1], start=1) if at >= FEWEST and token in ends), None)


def block_ends(start: int, length: int, turn: int | None = None) -> Iterator[int]:
    """The ends of blocks between `start` and `length`, which itself is none. turn: what `turn_end` says."""
    if turn is not None and start < turn < length:
        yield turn
    if start < FIRST < length:
        yield FIRST
    yield from range((start // BLOCK + 1) * BLOCK, length, BLOCK)


def prefill_blocks(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, reached: Callable[[int], None]) -> None:
    """Prefill a prompt's whole blocks, all but its last tokens.

    ids: [B, T]. cache: holds the first of them, or none. reached: called with the length of the cache after each block.
    """
    start = int(cache.get_seq_length())
    for end in block_ends(start, ids.shape[1], turn_end(model, ids[0].tolist())):
        model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        start = end
        reached(end)
