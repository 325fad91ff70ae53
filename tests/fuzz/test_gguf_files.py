"""Damaged and hostile GGUF files: each is read, or refused in one line that names it; never another exception, never for long."""

from __future__ import annotations

import random
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import model_table
from tests.fuzz.mutations import READ, REFUSED, changed_bytes, outcome
from tests.model_gguf import FILES, write_model_gguf
from tests.tiny_gguf import MODEL_TYPES, tiny_metadata, tiny_model, tiny_tensors, write_tiny_gguf
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model
from transformers_patches.weights.model_files import load_tokenizer

SETTINGS = {"method": "dense", "dtype": "float32", "device": "cpu", "kernels": "torch"}
VALUES = [
    *(None, True, False, 0, 1, 2, 3, 7, 255, 2**16, 10**9, 2**31 - 1, 2**32 - 1),
    *(
        0.0,
        -1.0,
        1e-30,
        1e30,
        float("nan"),
        float("inf"),
        "",
        "gpt2",
        "llama",
        "yarn",
        "longrope",
        "none",
        "x" * 5000,
        "\n{%",
    ),
    *([1], [0, 1], [2**31 - 1] * 3, [1.5], [True, False], ["a"], ["a", "a"], ["Ġ Ġ"] * 3, ["", " ", "Ġ"]),
]
KEYS = [
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length"),
    *("rope.dimension_count", "rope.freq_base_swa", "attention.sliding_window", "attention.sliding_window_pattern"),
    *("attention.causal", "expert_count", "attn_logit_softcapping", "final_logit_softcapping", "attention.scale"),
]
TOKENIZER_KEYS = [
    *("ggml.scores", "ggml.add_eos_token", "ggml.add_space_prefix", "ggml.eot_token_id", "ggml.eos_token_ids"),
    *("ggml.suppress_tokens", "chat_template.tool_use", "ggml.unheard_of"),
]


def both(path: Path) -> str:
    """What came of using the tokenizer and the model: `read+refused` and the like, or what is wrong with one of them."""
    results = [outcome(use, path) for use in (use_tokenizer, use_model)]
    return next((result for result in results if result not in (READ, REFUSED)), "+".join(results))


def use_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer("Two 22  words\n").input_ids)


@torch.no_grad()
def use_model(path: Path) -> None:
    model = load_model(path, PartInferConfig(**SETTINGS)).model
    model(torch.tensor([[1, 3, 4]]) % model.config.vocab_size)


def write_changed(path: Path, source: random.Random) -> None:
    """A well-formed file that says or holds something else."""
    if source.random() < 0.3:
        write_changed_model(path, source)
        return
    architecture = source.choice(list(MODEL_TYPES))
    model = tiny_model(architecture)
    keys = [
        *tiny_metadata(model),
        *(f"{architecture}.{key}" for key in KEYS),
        *(f"tokenizer.{k}" for k in TOKENIZER_KEYS),
    ]
    metadata = {source.choice(keys): source.choice(VALUES) for _ in range(source.choice((1, 1, 2, 3)))}
    tensors = {}
    if source.random() < 0.3:
        name, weight = source.choice(list(tiny_tensors(model).items()))
        tensors[name] = source.choice((None, weight[:1], weight[None], torch.zeros(3, 5)))
        tensors[source.choice(("rope_freqs.weight", "blk.7.ffn_up.weight", "blk.0.attn_q.bias"))] = weight.reshape(-1)
    write_tiny_gguf(path, model=model, metadata=metadata, tensors=tensors)


def write_changed_model(path: Path, source: random.Random) -> None:
    """The same of an architecture that is found by looking."""
    model_type = source.choice(("qwen3_moe", "phi3", "gpt_neox", "olmo3", "granitemoe", "glm4"))
    stored, model = FILES[model_type], model_table.tiny_model(model_type)
    keys = [*stored.keys, *KEYS, "expert_count", "rope.dimension_count", "attention.sliding_window_pattern"]
    metadata = {f"{stored.architecture}.{source.choice(keys)}": source.choice(VALUES) for _ in range(2)}
    names = ("ffn_up_exps", "ffn_gate_inp", "attn_qkv", "ffn_up", "attn_norm", "post_attention_norm")
    wrong = source.choice((None, torch.zeros(32), torch.zeros(6, 32, 32), torch.zeros(1, 5)))
    tensors = {f"blk.2.{source.choice(names)}.weight": wrong} if source.random() < 0.5 else {}
    write_model_gguf(path, model, metadata, tensors)


def campaign(folder: Path, seed: int, count: int) -> Counter:
    source = random.Random(seed)
    np.seterr(all="ignore")
    path = folder / "changed.gguf"
    write_tiny_gguf(path, "Q8_0")
    data = path.read_bytes()
    header = data.index(b"token_embd") + 2000
    seen = Counter()
    for number in range(count):
        path = folder / f"changed{number}.gguf"  # another name each time: nothing is remembered
        if source.random() < 0.5:
            path.write_bytes(changed_bytes(data, header, source))
        else:
            try:
                write_changed(path, source)
            except (ValueError, TypeError, OverflowError, struct.error):
                continue  # what the gguf package itself does not write
        seen[both(path)] += 1
        path.unlink()
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_files_are_read_or_refused(seed, tmp_path):
    seen = campaign(tmp_path, seed, 100)
    assert set(seen) <= {"read+read", "refused+refused", "read+refused", "refused+read"}, seen
    assert seen["refused+refused"] > 20
    assert seen["read+read"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_many_files_are_read_or_refused(seed, tmp_path):
    seen = campaign(tmp_path, seed, 1000)
    assert set(seen) <= {"read+read", "refused+refused", "read+refused", "refused+read"}, seen
