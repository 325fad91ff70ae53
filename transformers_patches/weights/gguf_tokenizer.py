"""The tokenizer of a GGUF file: it gives the tokens that llama.cpp gives."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf_file import read_gguf
from transformers_patches.weights.gguf_kept import Kept, TokenFacts
from transformers_patches.weights.gguf_schema import Metadata, named_templates
from transformers_patches.weights.gguf_vocabulary import (
    CONTROL,
    SENTENCEPIECE,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    has_vocabulary,
    read_vocabulary,
)

SPACE = "▁"  # what stands for a space in sentencepiece vocabularies
DEFAULT_TEMPLATE = "default"
Merge = tuple[str, str]  # two tokens that make a third


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer and chat templates. PartInferError if there is none, or none that can be built."""
    kept = Kept(path)  # before the file is read: of a file that is written meanwhile, this is nobody's key
    metadata = Metadata(read_gguf(path))
    metadata.check_keys()
    if not has_vocabulary(metadata):
        raise PartInferError(f"{path} has no tokenizer (its tokenizer.ggml.model is none): use a file that has one")
    facts, given = _as_given(kept, metadata)
    tokenizer = PreTrainedTokenizerFast(
        **given,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **facts.special,
    )
    template, others = metadata.text("tokenizer.chat_template", None), named_templates(metadata)
    if template is not None or others:
        tokenizer.chat_template = (
            others | ({} if template is None else {DEFAULT_TEMPLATE: template}) if others else template
        )
    return tokenizer


def _as_given(kept: Kept, metadata: Metadata) -> tuple[TokenFacts, dict[str, Any]]:
    """The tokenizer as transformers takes it: its file if it is kept, for an object would be copied by way of its text."""
    backend = None
    if (found := kept.tokenizer()) is None:
        facts, backend = _built(metadata)
        kept.keep(facts, backend)
        found = kept.tokenizer()
    if found is None:
        return facts, {"tokenizer_object": backend}
    return found[0], {"tokenizer_file": str(found[1])}


def _built(metadata: Metadata) -> tuple[TokenFacts, Tokenizer]:
    vocabulary = read_vocabulary(metadata)
    backend = backend_of(vocabulary, metadata.text("general.name", ""))
    backend.post_processor = _ends_of_text(vocabulary)
    return TokenFacts.of(vocabulary), backend


def backend_of(vocabulary: Vocabulary, name: str = "") -> Tokenizer:
    """What gives a vocabulary's tokens, without those at the ends of a text. PartInferError if it can't be built.

    name: of the model, which decides what some control tokens swallow.
    """
    try:
        backend = _sentencepiece(vocabulary) if vocabulary.kind == SENTENCEPIECE else byte_level(vocabulary)
    except PartInferError:
        raise
    except Exception as error:  # tokenizers raises plain Exceptions
        reason = " ".join(str(error).split())[:200]
        raise PartInferError(f"{vocabulary.source} has no usable tokenizer: {reason}") from None
    _add_tokens(backend, vocabulary, name)
    return backend


def byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """BPE over bytes, without what is matched whole."""
    ids = {token: place for place, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(ids, vocabulary.merges, ignore_merges=vocabulary.pre.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in vocabulary.pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """Neighbours that make the token of the highest score are joined first; what is not a token becomes bytes."""
    ids = {token: place for place, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.tokens[vocabulary.named.get("unk", 0)]
    model = models.BPE(ids, _merges_by_score(vocabulary, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend(SPACE)] if vocabulary.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", left=1)] if vocabulary.add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary, ids: dict[str, int]) -> list[Merge]:
    """By falling score; of equal ones, what makes a longer token comes first, then the smaller id.

    llama.cpp takes the leftmost of equal scores, here every merge has a rank of its own. Llama's own vocabulary has one
    score for all runs of spaces. There the order by length does the same: a run on the left grows to its full length
    before the next one begins. PartInferError where the order could change what a text becomes.
    """
    found = []
    for token, place in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-vocabulary.scores[place], -len(token), place, ids[left], ids[right], left, right))
    found.sort()
    scored = [(-score, left, right) for score, *_, left, right in found]
    _check_ties(vocabulary, scored)
    return [(left, right) for _, left, right in scored]


def _check_ties(vocabulary: Vocabulary, scored: list[tuple[float, str, str]]) -> None:
    """Raise PartInferError for merges of equal scores that can be in each other's way.

    That is where two of them share a part (a+b and b+c in "abc"), or where one makes a part of a merge that is due at
    once. Left out are runs of one character, and different ways to the same token.

    scored: merges, each after its score, by falling score.
    """
    whole = (CONTROL, UNKNOWN, USER_DEFINED)  # matched before anything is merged
    never = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in whole}
    uses: dict[str, float] = {}  # of a token: the highest score of a merge that takes it
    for score, left, right in scored:
        if not _is_run(left + right):
            uses |= {part: max(score, uses.get(part, -math.inf)) for part in (left, right)}
    for score, group in groupby(scored, key=lambda merge: merge[0]):
        tied = [(left, right) for _, left, right in group if left + right not in never]
        made = {left + right for left, right in tied}
        if len(made) < 2:
            continue
        endings: dict[str, set[str]] = {}  # of a right part: what is made with it
        for left, right in tied:
            endings.setdefault(right, set()).add(left + right)
        for left, right in tied:
            token = left + right
            others = {other for other in endings.get(left, ()) if other != token and not _is_run(token + other)}
            if others or uses.get(token, -math.inf) >= score:
                raise PartInferError(
                    f"{vocabulary.source}: {len(made)} tokens have the score {score:g}, {token[:40]!r} and "
                    f"{min(others or made - {token})[:40]!r} among them, so that nothing says which is made first: use a "
                    "GGUF file whose tokenizer.ggml.scores differ, or the model's folder"
                )


def _is_run(token: str) -> bool:
    """Whether it is one character again and again."""
    return token == token[0] * len(token)


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, name: str) -> None:
    """What is matched whole in a text before anything else: control tokens, and plain ones that users defined."""
    swallows_space = any(part in name.lower() for part in ("phi-3", "phi3"))
    special, plain = [], []
    for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            rstrip = swallows_space and text not in ("<unk>", "<s>", "<|endoftext|>")
            token = AddedToken(text, normalized=False, special=kind != USER_DEFINED, rstrip=rstrip)
            (plain if kind == USER_DEFINED else special).append(token)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _ends_of_text(vocabulary: Vocabulary) -> processors.PostProcessor | None:
    """What adds the first and the last token."""
    added = {
        "bos": vocabulary.bos if vocabulary.add_bos else None,
        "eos": vocabulary.eos if vocabulary.add_eos else None,
    }
    added = {name: place for name, place in added.items() if place is not None}
    if not added:
        return None

    def around(text: str, kind: int) -> list[str]:
        before, after = ([f"{name}:{kind}"] if name in added else [] for name in ("bos", "eos"))
        return [*before, f"{text}:{kind}", *after]

    return processors.TemplateProcessing(
        single=around("$A", 0),
        pair=[*around("$A", 0), *around("$B", 1)],
        special_tokens=[
            {"id": name, "ids": [place], "tokens": [vocabulary.tokens[place]]} for name, place in added.items()
        ],
    )
