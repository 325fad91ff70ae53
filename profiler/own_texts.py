"""Texts that the model samples itself, for calibration without any data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from profiler.collect import end_token_ids, generate, until_end
from profiler.processes import joined


class OwnTexts:
    """Sampled token sequences. Text i does not depend on what was sampled before it.

    The processes of `accelerate launch` take batches in turn, and every process gets all texts.

    prefix: how every text begins, such as `Question:`; if empty, with the tokenizer's begin-of-text token, else its end
        token, else token 0
    max_new_tokens: how many tokens to sample per text
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefix: str,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
        processes: PartialState,
    ) -> None:
        self.model, self.batch_size, self.seed, self.processes = model, batch_size, seed, processes
        self.max_new_tokens = max_new_tokens
        start = tokenizer(prefix)["input_ids"] if prefix else []
        self.start = start or [next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)]

    def sequences(self, first: int = 0) -> Iterator[list[int]]:
        """An endless stream of texts from number `first` on, which must be a multiple of the batch size."""
        batch = first // self.batch_size
        while True:
            mine = self._sample(batch + self.processes.process_index)
            yield from joined(mine, self.processes)
            batch += self.processes.num_processes

    @torch.inference_mode()
    def _sample(self, batch: int) -> list[list[int]]:
        inputs = torch.tensor([self.start] * self.batch_size, device=self.model.device)
        cuda = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self.seed * 1_000_003 + batch)
            sampled = generate(self.model, inputs, torch.ones_like(inputs), self.max_new_tokens, do_sample=True)
        ends = end_token_ids(self.model)
        return [self.start + until_end(ids, ends) for ids in sampled]
