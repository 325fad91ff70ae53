"""One method on some prompts, as evaluate_memory.py runs it in a limited process."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluation.memory import run_limited

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.fixture
def job(model_folder) -> dict:
    return {
        "engine": "partinfer",
        "path": str(model_folder),
        "threads": 2,
        "settings": {"context": 32, "dtype": "float32", "method": "dense"},
        "prompts": PROMPTS,
        "new_tokens": 6,
        "seconds": 60,
    }


def greedy(folder, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return ids[0, len(prompt) :].tolist()


def test_answers_are_those_of_generation(job, model_folder):
    result = run_limited.measure(job)
    assert result["answers"] == [greedy(model_folder, prompt, 6) for prompt in PROMPTS]
    assert len(result["prompts"]) == 2
    assert all(row["tokens_per_second"] > 0 and row["first_token_s"] > 0 for row in result["prompts"])
    assert result["prompts"][0]["hit_rate"] is None  # nothing is on disk
    assert result["peak_mb"] > 10


def test_an_answer_of_one_token_has_no_speed(job):
    result = run_limited.measure(job | {"new_tokens": 1, "prompts": PROMPTS[:1]})
    assert len(result["answers"][0]) == 1
    assert result["prompts"][0]["tokens_per_second"] is None


def test_what_is_too_slow_ends_with_the_tokens_so_far(job):
    result = run_limited.measure(job | {"seconds": 0})
    assert [len(answer) for answer in result["answers"]] == [1]
