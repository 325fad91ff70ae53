"""The tokenizer of a GGUF file: it gives the tokens that llama.cpp gives."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf_file import read_gguf
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


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer and chat templates. PartInferError if there is none, or none that can be built."""
    metadata = Metadata(read_gguf(path))
    metadata.check_keys()
    if not has_vocabulary(metadata):
        raise PartInferError(f"{path} has no tokenizer (its tokenizer.ggml.model is none): use a file that has one")
    vocabulary = read_vocabulary(metadata)
    try:
        backend = _sentencepiece(vocabulary) if vocabulary.kind == SENTENCEPIECE else _byte_level(vocabulary)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise PartInferError(f"{path} has no usable tokenizer: {' '.join(str(error).split())[:200]}") from None
    _add_tokens(backend, vocabulary, metadata.text("general.name", ""))
    backend.post_processor = _ends_of_text(vocabulary)
    special = {
        f"{name}_token": vocabulary.tokens[vocabulary.named[name]]
        for name in ("bos", "eos", "unk", "pad")
        if name in vocabulary.named
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
    template, others = metadata.text("tokenizer.chat_template", None), named_templates(metadata)
    if template is not None or others:
        tokenizer.chat_template = (
            others | ({} if template is None else {DEFAULT_TEMPLATE: template}) if others else template
        )
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
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


def _merges_by_score(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    found = []
    for token, place in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-vocabulary.scores[place], place, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


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
