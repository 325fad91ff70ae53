"""The vocabulary of a GGUF file, with llama.cpp's defaults where it says nothing, and the tokens that end an answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from transformers_patches.weights.gguf_schema import Metadata

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # tokenizer.ggml.model
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
LONGEST_TOKEN = 1024  # characters; how a token is put together takes the square of its length to find out
NO_VOCABULARY = ("none", "no_vocab")

# Tokens that end an answer whatever the file says about them (llama-vocab.cpp)
_END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *(
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
    ),
    *("<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
# Tokens of filling in code, which end an answer, too; a file's own key comes first
_FILL_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary, with nothing left open."""

    source: Path  # the file, for messages
    kind: str  # BYTE_LEVEL or SENTENCEPIECE
    tokens: list[str]  # by token id
    types: list[int]  # the type of each token
    merges: list[tuple[str, str]] | None  # of a byte-level vocabulary, first to last
    scores: list[float] | None  # of a sentencepiece vocabulary, one for each token
    pre: PreTokenizer  # its patterns are used for byte-level vocabularies only
    bos: int | None  # id of the token that begins a text
    eos: int | None  # id of the token that ends a text
    named: dict[str, int]  # ids of bos, eos, unk and pad, as far as the file itself gives them
    ends: list[int]  # ids of the tokens that end an answer, eos first
    add_bos: bool  # whether a text begins with bos
    add_eos: bool  # whether a text ends with eos
    add_space_prefix: bool  # whether a space is put before a text


def has_vocabulary(metadata: Metadata) -> bool:
    return metadata.text("tokenizer.ggml.model", "none") not in NO_VOCABULARY


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Read the vocabulary from a file's metadata.

    Raises PartInferError for another kind of tokenizer, an unknown pre-tokenizer, and lists that don't fit each other.
    """
    path = metadata.file.path
    kind = metadata.text("tokenizer.ggml.model")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        raise PartInferError(
            f"{path} has a tokenizer of the kind {kind[:80]!r}; {BYTE_LEVEL} and {SENTENCEPIECE} can be read"
        )
    tokens = metadata.texts("tokenizer.ggml.tokens")
    tokens = [token or f"[EMPTY_{place}]" for place, token in enumerate(tokens)]
    ids = {token: place for place, token in enumerate(tokens)}
    if not tokens or len(ids) < len(tokens):
        raise PartInferError(f"{path}: tokenizer.ggml.tokens is empty or has a token twice: fetch it again")
    if (longest := max(map(len, tokens))) > LONGEST_TOKEN:
        raise PartInferError(
            f"{path} has a token of {longest} characters, expected {LONGEST_TOKEN} at most: fetch it again"
        )
    types = metadata.numbers("tokenizer.ggml.token_type", len(tokens))
    types = [NORMAL] * len(tokens) if types is None else [int(kind) for kind in types[: len(tokens)]]
    pre = PreTokenizer((), add_bos=True) if kind == SENTENCEPIECE else _pre_tokenizer(metadata)
    suppressed = metadata.numbers("tokenizer.ggml.suppress_tokens")
    if suppressed is not None and len(suppressed):
        metadata.refuse("tokenizer.ggml.suppress_tokens", "tokens can't be suppressed here")
    named = _named_ids(metadata, len(tokens))
    defaults = {"bos": 1, "eos": 2} if kind == SENTENCEPIECE else {"bos": 11 if pre.has_bos else None, "eos": 11}
    bos, eos = (named.get(name, _inside(defaults[name], len(tokens))) for name in ("bos", "eos"))
    ends = _ends(metadata, ids, tokens, named, eos)
    for place in ends:  # control tokens even if the file says that they are plain text
        if tokens[place] in _END_TEXTS or tokens[place] in sum(_FILL_TEXTS.values(), ()):
            types[place] = CONTROL
    for token in _ALWAYS_SHOWN:
        if token in ids:
            types[ids[token]] = USER_DEFINED
    return Vocabulary(
        source=path,
        kind=kind,
        tokens=tokens,
        types=types,
        merges=_merges(metadata, ids) if kind == BYTE_LEVEL else None,
        scores=_scores(metadata, len(tokens)) if kind == SENTENCEPIECE else None,
        pre=pre,
        bos=bos,
        eos=eos,
        named=named,
        ends=ends,
        add_bos=metadata.flag("tokenizer.ggml.add_bos_token", pre.add_bos) and bos is not None,
        add_eos=metadata.flag("tokenizer.ggml.add_eos_token", False) and eos is not None,
        add_space_prefix=metadata.flag("tokenizer.ggml.add_space_prefix", True) and kind == SENTENCEPIECE,
    )


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    name = metadata.text("tokenizer.ggml.pre", "default") or "default"
    if name not in PRE_TOKENIZERS:
        raise PartInferError(
            f"{metadata.file.path} has the pre-tokenizer {name[:80]!r}, which is not known here; known are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _inside(place: int | None, count: int) -> int | None:
    return place if place is not None and 0 <= place < count else None


def _named_ids(metadata: Metadata, count: int) -> dict[str, int]:
    """By short name; those outside of the vocabulary (-1, 2**32 - 1) mean that there is no such token."""
    keys = {"unk": "unknown_token_id", "pad": "padding_token_id"}
    keys |= {name: f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", *_FILL_TEXTS)}
    found = {name: metadata.integer(f"tokenizer.ggml.{key}", None, -1, 2**32 - 1) for name, key in keys.items()}
    return {name: place for name, place in found.items() if _inside(place, count) is not None}


def _ends(
    metadata: Metadata, ids: dict[str, int], tokens: list[str], named: dict[str, int], eos: int | None
) -> list[int]:
    ends = {ids[text] for text in _END_TEXTS if text in ids}
    ends |= {named[name] for name in ("eot", "eom") if name in named}
    for name, texts in _FILL_TEXTS.items():
        ends |= {named[name]} if name in named else {ids[text] for text in texts if text in ids}
    more = metadata.numbers("tokenizer.ggml.eos_token_ids")
    if more is not None:
        ends |= {int(place) for place in more if _inside(int(place), len(tokens)) is not None}
    texts = {tokens[place] for place in ends}
    if "<|end|>" in texts and (
        {"<|return|>", "<|call|>"} <= texts or ("<|flush|>" in texts and texts & {"<|call|>", "<|calls|>"})
    ):
        ends.discard(ids["<|end|>"])  # there it ends a message, not the answer
    if "</s>" in texts and "<|tool_response>" in texts:
        ends.discard(ids["</s>"])
    return [*([] if eos is None else [eos]), *sorted(ends - {eos})]


def _merges(metadata: Metadata, ids: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, merge in enumerate(metadata.texts("tokenizer.ggml.merges")):
        space = merge.find(" ", 1)
        left, right = merge[:space], merge[space + 1 :]
        if space < 0 or left not in ids or right not in ids or left + right not in ids:
            raise PartInferError(
                f"{metadata.file.path}: merge {number} of tokenizer.ggml.merges, {merge[:80]!r}, must be two tokens that make "
                "a third: fetch it again"
            )
        merges.append((left, right))
    return merges


def _scores(metadata: Metadata, count: int) -> list[float]:
    scores = metadata.numbers("tokenizer.ggml.scores", count)
    return [0.0] * count if scores is None else scores[:count].tolist()
