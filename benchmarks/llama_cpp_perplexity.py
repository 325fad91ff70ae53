#!/usr/bin/env python3
"""llama.cpp's perplexity on the windows of evaluation/evaluate_perplexity.py, its weights written from the same model."""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.speed.gguf_model import TYPES, write_gguf  # noqa: E402
from evaluation.windows import Example, Source, read_examples  # noqa: E402
from transformers_patches.weights.lookup import find_model  # noqa: E402
from transformers_patches.weights.model_files import load_tokenizer, open_weights, read_config  # noqa: E402

CONTEXT_TOKENS = 512


@llama_cpp.llama_log_callback
def _silent(level, text, user_data) -> None:
    pass


class LlamaCpp:
    """A GGUF file in llama.cpp, through its C interface: the files that write_gguf writes have no vocabulary."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT_TOKENS
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(CONTEXT_TOKENS, 0, 1)

    def logits(self, tokens: list[int], first: int) -> np.ndarray:
        """float64 [len(tokens) - first, V], what is predicted at each position from `first` on."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = self.batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = place >= first
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp failed to decode")
        rows = [llama_cpp.llama_get_logits_ith(self.context, place) for place in range(first, len(tokens))]
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)).astype(np.float64) for row in rows])

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def nll(llama: LlamaCpp, example: Example) -> float:
    """Sum over the scored tokens, each predicted from all tokens before it."""
    tokens, first = example.context + example.target, len(example.context) - 1
    scores = llama.logits(tokens[:-1], first)
    highest = scores.max(axis=1, keepdims=True)
    normalizer = highest[:, 0] + np.log(np.exp(scores - highest).sum(axis=1))
    return float((normalizer - scores[np.arange(len(example.target)), example.target]).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name", required=True, help="a checkpoint folder, short name or hub id")
    parser.add_argument("--dataset", required=True, help="as evaluate_perplexity.py takes it")
    parser.add_argument("--limit", type=int, help="windows (all)")
    parser.add_argument("--types", default="bfloat16,q8_0,q4_0", help=f"some of {', '.join(TYPES)}")
    options = parser.parse_args()
    folder = find_model(options.model_name)
    config = read_config(folder)
    source = Source(options.dataset, limit=options.limit)
    examples = read_examples(source, load_tokenizer(folder), config.max_position_embeddings)
    count = sum(len(example.target) for example in examples)
    for kind in options.types.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.gguf"
            write_gguf(path, open_weights(folder), config, kind)
            llama = LlamaCpp(path)
            mean = sum(nll(llama, example) for example in tqdm(examples, desc=kind, leave=False)) / count
            print(f"llama.cpp {kind}: NLL {mean:.4f}, perplexity {math.exp(mean):.3f}", flush=True)
            llama.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
