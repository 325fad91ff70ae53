"""A GGUF file in llama.cpp itself, the judge of what the file means; tests that need it are skipped where it is not installed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not there: pip install llama-cpp-python")


@llama_cpp.llama_log_callback
def _silent(level, text, user_data) -> None:
    pass


class LlamaCppModel:
    """AssertionError if llama.cpp can't load the file. context: positions that it makes room for."""

    def __init__(self, path: Path, context: int = 256) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        assert self.model, f"llama.cpp can't load {path}"
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.context = context

    def tokens(self, text: str) -> list[int]:
        """As for a prompt: with what is added at its ends, and control tokens recognised."""
        data = text.encode()
        found = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), found, len(found), True, True)
        return list(found[:count])

    def ends(self) -> set[int]:
        """The tokens that end an answer."""
        count = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        return {token for token in range(count) if llama_cpp.llama_vocab_is_eog(self.vocabulary, token)}

    def logits(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), V]"""
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self.context
        settings.n_threads = settings.n_threads_batch = 1
        settings.flash_attn_type = 0
        settings.type_k = settings.type_v = 0  # float32
        context = llama_cpp.llama_init_from_model(self.model, settings)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
            batch.seq_id[place][0] = 0
        assert llama_cpp.llama_decode(context, batch) == 0
        shape = (len(ids), llama_cpp.llama_vocab_n_tokens(self.vocabulary))
        values = torch.from_numpy(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=shape).copy())
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return values
