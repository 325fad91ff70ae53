"""The metadata of a GGUF file that stand for a sentencepiece vocabulary (Llama 2's, Gemma's): BPE that falls back to bytes.

In llama.cpp the neighbours that make the token of the highest score are joined first. A tokenizer.json has merges in place of
scores. They come from the scores, so a token's score is how early the first merge is that makes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf_tokenizer import backend_of
from transformers_patches.weights.gguf_vocabulary import NORMAL, SENTENCEPIECE, UNKNOWN, Vocabulary

BYTE = 6  # tokenizer.ggml.token_type of what stands for one byte
_NEVER_MADE = -1e6  # the score of tokens that no merge makes


def is_sentencepiece(described: dict) -> bool:
    """Whether a tokenizer.json's model is BPE that falls back to bytes."""
    return described.get("type") == "BPE" and bool(described.get("byte_fallback"))


def sentencepiece_metadata(
    own: Vocabulary, tokenizer: PreTrainedTokenizerBase, samples: Sequence[str]
) -> dict[str, object]:
    """What is special to such a vocabulary.

    own: tokens, types and merges. samples: texts whose tokens must be the tokenizer's.

    Raises PartInferError if llama.cpp would give other tokens.
    """
    types = [_type(token, kind) for token, kind in zip(own.tokens, own.types, strict=True)]
    unknown = tokenizer.unk_token_id
    if unknown is not None:
        types[unknown] = UNKNOWN
    made: dict[str, float] = {}
    for rank, (left, right) in enumerate(own.merges or ()):
        made.setdefault(left + right, -float(rank))
    scores = [made.get(token, _NEVER_MADE) for token in own.tokens]
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in samples]
    for prefix in (False, True):
        tried = replace(own, kind=SENTENCEPIECE, types=types, scores=scores, add_space_prefix=prefix)
        backend = backend_of(tried)
        if [backend.encode(text, add_special_tokens=False).ids for text in samples] == expected:
            return {
                "tokenizer.ggml.model": SENTENCEPIECE,
                "tokenizer.ggml.pre": "default",
                "tokenizer.ggml.scores": scores,
                "tokenizer.ggml.token_type": types,
                "tokenizer.ggml.add_space_prefix": prefix,
            }
    raise PartInferError(
        f"{own.source} joins tokens as llama.cpp's sentencepiece does not: export a folder, and use llama.cpp's "
        "convert_hf_to_gguf.py"
    )


def _type(token: str, kind: int) -> int:
    return BYTE if kind == NORMAL and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else kind
