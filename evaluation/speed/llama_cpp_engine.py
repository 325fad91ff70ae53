"""llama.cpp through llama-cpp-python's C interface, with the settings that decode fastest here."""

from __future__ import annotations

import itertools
import time

import llama_cpp
import numpy as np

from evaluation.compared.library import silence
from evaluation.speed.job import Job, Timing
from transformers_patches.errors import PartInferError

CONTEXT_TOKENS = 4096
TUNING_TOKENS = 8


class LlamaCppEngine:
    """A GGUF file in llama.cpp, with memory mapping and flash attention on or off, whichever decodes fastest."""

    def __init__(self, job: Job) -> None:
        silence()
        llama_cpp.llama_backend_init()
        self.job, self.variants = job, [job.label]
        self.generated: list[int] = []  # of the last run
        self._model = self._context = None
        speeds = {}
        for choice in itertools.product((True, False), (True, False)):
            self._open(*choice)
            self.run(job.label, [[1, 2, 3, 4]], TUNING_TOKENS)
            speeds[choice] = max(
                self.run(job.label, [[1, 2, 3, 4]], TUNING_TOKENS).decode_steps_per_second for _ in "123"
            )
        self.mapped, self.flash = max(speeds, key=speeds.get)
        started = time.perf_counter()
        self._open(self.mapped, self.flash)
        self.load_s = time.perf_counter() - started

    def _open(self, mapped: bool, flash: bool) -> None:
        self._close()
        options = llama_cpp.llama_model_default_params()
        options.use_mmap, options.n_gpu_layers = mapped, 0
        self._model = llama_cpp.llama_model_load_from_file(str(self.job.compared.path).encode(), options)
        if not self._model:
            raise PartInferError(f"llama.cpp can't load {self.job.compared.path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT_TOKENS, 2048, 512
        settings.n_threads = settings.n_threads_batch = self.job.threads
        settings.flash_attn_type = int(flash)
        settings.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise PartInferError(f"llama.cpp can't run {self.job.compared.path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def _close(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._model = self._context = None

    def run(self, variant: str, prompts: list[list[int]], new_tokens: int) -> Timing:
        (tokens,) = prompts
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self.generated = []
        seconds, started = [], time.perf_counter()
        for _ in range(new_tokens):
            values = (llama_cpp.llama_token * len(tokens))(*tokens)
            if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(values, len(tokens))):
                raise PartInferError("llama.cpp failed to decode")
            logits = llama_cpp.llama_get_logits_ith(self._context, -1)
            tokens = [int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())]
            self.generated += tokens
            seconds.append(time.perf_counter() - started)
        return Timing(tuple(seconds))

    def facts(self, variant: str) -> dict:
        total = llama_cpp.llama_model_size(self._model)
        mapping, flash = ("on" if on else "off" for on in (self.mapped, self.flash))
        return {
            "sparsity": None,
            "loaded_neurons_percent": 1.0,
            "computed_neurons_percent": 1.0,
            "sparse_layers": 0,
            "neurons_per_layer_and_token": None,
            "weight_bytes_resident": total,
            "weight_bytes_per_token": self.job.compared.token_bytes,
            "settings": f"{self.job.compared.note}; mmap {mapping}, flash attention {flash}; "
            f"llama-cpp-python {llama_cpp.__version__}",
        }
