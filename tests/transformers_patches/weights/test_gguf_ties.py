"""Sentencepiece vocabularies whose scores are equal: the tokens that llama.cpp merges, or an error."""

from __future__ import annotations

import heapq
import random

import pytest

from tests.tiny_gguf import tiny_model, write_tiny_gguf
from transformers_patches.errors import PartInferError
from transformers_patches.weights.model_files import load_tokenizer

SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """The tokens of a text, merged as llama.cpp does it: the highest score first, of equal ones the leftmost."""
    parts: list[str] = list(text)
    after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(parts) and parts[left] + parts[right] in scores:
            token = parts[left] + parts[right]
            heapq.heappush(queue, (-scores[token], left, right, token))

    for place in range(len(parts)):
        offer(place, place + 1)
    while queue:
        _, left, right, token = heapq.heappop(queue)
        if not parts[left] or not parts[right] or parts[left] + parts[right] != token or after[left] != right:
            continue
        parts[left], parts[right] = token, ""
        after[left] = after[right]
        if after[right] < len(parts):
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [part for part in parts if part]


def written(path, scores: dict[str, float]):
    listed = ["<unk>", "<s>", "</s>", *BYTES, *scores]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": listed,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(score) for score in scores.values()],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(scores),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    write_tiny_gguf(path, model=tiny_model("llama", vocab_size=len(listed)), metadata=metadata)
    return path


def spaces(count: int, score: float = -1e9) -> dict[str, float]:
    return {SPACE * length: score for length in range(2, count + 1)}


def letters(text: str) -> dict[str, float]:
    return {letter: -2e9 - number for number, letter in enumerate(text)}


def check(tokenizer, scores: dict[str, float], source: random.Random, alphabet: str, texts: int = 60) -> None:
    for _ in range(texts):
        text = "".join(source.choices(alphabet, k=source.randrange(1, 25)))
        found = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        assert found == merged(text.replace(" ", SPACE), scores), text


def test_runs_of_spaces_as_in_llamas_vocabulary(tmp_path):
    scores = {"ab": -1, "▁a": -2, "▁ab": -3, "ba": -4} | spaces(16) | letters("▁abc")
    tokenizer = load_tokenizer(written(tmp_path / "tiny.gguf", scores))
    source = random.Random(0)
    check(tokenizer, scores, source, "  abc")
    for count in range(1, 60):
        for text in (" " * count, f"{' ' * count}ab", f"c{' ' * count}c"):
            found = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
            assert found == merged(text.replace(" ", SPACE), scores)


@pytest.mark.parametrize(
    "scores",
    [
        {"ab": -1, "bc": -1},
        {"ab": -1, "abc": -1, "cd": -2},
        {"ab": -1, "cd": -1, "abc": -0.5},
        dict.fromkeys(("ab", "bc", "ca", "abc"), -1000),
    ],
)
def test_scores_that_leave_it_open(scores, tmp_path):
    with pytest.raises(PartInferError, match=r"tokens have the score -1.*differ, or the model's folder") as raised:
        load_tokenizer(written(tmp_path / "tiny.gguf", scores | letters("abcd")))
    assert "\n" not in str(raised.value)


def test_random_vocabularies(tmp_path):
    """Few scores for many tokens: whatever is not refused is merged as llama.cpp does it."""
    read = 0
    for seed in range(80):
        source = random.Random(seed)
        tokens = {"".join(source.choices("abc ", k=source.choice((2, 2, 2, 3, 3, 4)))) for _ in range(8)}
        scores = {token.replace(" ", SPACE): -source.randrange(1, 30) for token in sorted(tokens)}
        scores |= spaces(source.choice((1, 4, 7)), -50) | letters("▁abc")
        try:
            tokenizer = load_tokenizer(written(tmp_path / "tiny.gguf", scores))
        except PartInferError:
            continue
        read += 1
        check(tokenizer, scores, source, " abc", 30)
    assert read > 30
