"""The processes of `accelerate launch`, which share an evaluation's examples among them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from transformers_patches.errors import PartInferError

WAITING = timedelta(weeks=52)  # of a process for the slowest one


class Processes:
    """This process among the others; without a launcher it is alone.

    number: of this process, from 0
    count: how many there are
    """

    def __init__(self) -> None:
        self.number, self.count = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(timeout=WAITING)
            self.number, self.count = state.process_index, state.num_processes

    @property
    def first(self) -> bool:
        """Whether this is the process that reports."""
        return self.number == 0

    def gathered(self, mine: Any) -> list:
        """The objects of all processes, in their order, for all of them. Every process must call it."""
        if self.count == 1:
            return [mine]
        from torch import distributed

        everyones = [None] * self.count
        distributed.all_gather_object(everyones, mine)
        return everyones

    def refuse_several(self, what: str) -> None:
        """Raise PartInferError if there are several processes."""
        if self.count > 1:
            raise PartInferError(f"{what} runs in one process, got {self.count}: leave out accelerate launch")


def merged_counts(counts: list[dict]) -> dict:
    """What several processes' weight_counts are together: decoded tokens add up, and averages count by them.

    What does not depend on tokens is the first process's.
    """
    tokens = [count["decoded_tokens"] for count in counts]
    whole = dict(counts[0])
    for name in ("decoded_tokens", "computed_neurons"):
        whole[name] = sum(count[name] for count in counts)
    if len(counts) > 1 and sum(tokens):
        for name in ("ffn_bytes_fraction", "token_bytes", "block_bytes_fraction"):
            whole[name] = sum(n * count[name] for n, count in zip(tokens, counts, strict=True)) / sum(tokens)
        whole["token_bytes"] = round(whole["token_bytes"])
    return whole
