"""llama.cpp's logits on the examples that the methods are scored on, by the same protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from evaluation.compared.library import silence
from evaluation.windows import Example
from transformers_patches.errors import PartInferError


class LlamaCppModel:
    """A GGUF file in llama.cpp, through its C interface: files without a vocabulary work, too.

    context: tokens that the longest example has; threads: of the computation
    """

    def __init__(self, path: Path, context: int, threads: int) -> None:
        silence()
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise PartInferError(f"llama.cpp can't load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise PartInferError(f"llama.cpp can't run {path}")
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    @property
    def resident_bytes(self) -> int:
        """Bytes of all its weights."""
        return llama_cpp.llama_model_size(self._model)

    def logits(self, example: Example, *, token_by_token: bool) -> torch.Tensor:
        """float32 [len(example.target), V]: the context except for its last token is prefilled, the rest scored over it.

        token_by_token: the rest one token at a time, as llama.cpp decodes; else in one pass
        """
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        if len(example.context) > 1:
            self._pass(example.context[:-1], 0, last_only=True)
        fed = [example.context[-1], *example.target[:-1]]
        place = len(example.context) - 1
        if not token_by_token:
            return self._pass(fed, place)
        return torch.cat([self._pass([token], place + number) for number, token in enumerate(fed)])

    def _pass(self, tokens: list[int], place: int, *, last_only: bool = False) -> torch.Tensor:
        """Logits [len(tokens), V] of one pass, the first token at position `place`; with last_only [1, V]."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        last = len(tokens) - 1
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, place + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = not last_only or index == last
        if llama_cpp.llama_decode(self._context, batch):
            raise PartInferError("llama.cpp failed to decode")
        wanted = [last] if last_only else range(len(tokens))
        rows = [llama_cpp.llama_get_logits_ith(self._context, index) for index in wanted]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows]))

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


def compared_logits(
    model: LlamaCppModel, examples: list[Example], *, token_by_token: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """For each example, its index and the logits [T, V] of its target."""
    for index, example in enumerate(examples):
        yield index, model.logits(example, token_by_token=token_by_token)
