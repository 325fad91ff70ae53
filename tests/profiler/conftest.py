"""Tiny random models with a byte tokenizer, as checkpoint folders."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.profiler.byte_tokenizer import END, byte_tokenizer


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=END,
        pad_token_id=None,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """A JSONL file of 21 questions of different lengths."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    lines = [f'{{"question": "What is {"very " * (i % 7)}much {i}?"}}' for i in range(21)]
    path.write_text("\n".join(lines) + "\n")
    return path
