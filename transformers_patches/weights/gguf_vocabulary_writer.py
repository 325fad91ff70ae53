"""The metadata of a GGUF file that stand for a tokenizer, for llama.cpp to give the same tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf_file import read_gguf
from transformers_patches.weights.gguf_pre_tokenizers import PRE_TOKENIZERS
from transformers_patches.weights.gguf_sentencepiece_writer import is_sentencepiece, sentencepiece_metadata
from transformers_patches.weights.gguf_tokenizer import byte_level
from transformers_patches.weights.gguf_vocabulary import BYTE_LEVEL, CONTROL, NORMAL, USER_DEFINED, Vocabulary

UNUSED = 5  # tokenizer.ggml.token_type of an embedding that no token has
# Where pre-tokenizers differ: digits, short forms, cases, spaces, marks, other scripts. All in composed characters,
# since llama.cpp does not compose any.
_SAMPLES = (
    "In 1923, 24 people said: «Größe» don't I'LL 12345678 $5.00 x=y+1; foo_bar(a,b)\n\n  indented\tline\r\n end  ",
    "日本語のテキスト、中文字符。한국어 텍스트 ไทย العربية ١٢٣ русский Текст ÉCOLE éÉa aÉb",
    "  leading   spaces\n\n\n\nnew lines \n x\n",
    "emoji 😀👍🏽 math ∑∫≤ ½ ² 3.14e-10 http://a.b/c?d=e&f=g <tag attr='v'> `code` ~~ ^^ || @#%",
    "HelloWorld camelCase snake_case UPPER MiXeD 's 'T 'RE don'T we'Ve I'd'm",
    "100 1000 10000 100000 1000000 1234567890 …—“quoted”！？",
)


def vocabulary_metadata(
    model: Path, tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int]
) -> dict[str, object]:
    """Metadata of a model's tokenizer, by key.

    model: its folder or GGUF file, whose own metadata are taken.
    rows: of the embeddings; those without a token get one that nothing becomes.
    ends: the tokens that end an answer.

    Raises PartInferError for what is neither BPE over bytes nor sentencepiece's, and where llama.cpp would give other tokens.
    """
    if model.is_file():
        metadata = read_gguf(model).metadata
        kept = {key: _plain(value) for key, value in metadata.items() if key.startswith("tokenizer.")}
        return {key: value for key, value in kept.items() if value != []}
    described = _described(model, tokenizer)
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= rows:
        raise PartInferError(f"{model} has a tokenizer of {max(ids.values()) + 1} tokens, but embeddings of {rows}")
    tokens = [f"[PAD{place}]" for place in range(rows)]
    types = [UNUSED] * rows
    added = tokenizer.added_tokens_decoder
    for token, place in ids.items():
        special = place in added and added[place].special
        tokens[place], types[place] = token, CONTROL if special else USER_DEFINED if place in added else NORMAL
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in described["merges"]]
    named = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    named = {name: place for name, place in named.items() if place is not None}
    around = tokenizer("x").input_ids
    first, last = around[0] == named.get("bos"), around[-1] == named.get("eos")
    own = Vocabulary(
        model, BYTE_LEVEL, tokens, types, merges, None, PRE_TOKENIZERS["gpt-2"], None, None, {}, [], False, False, False
    )
    keys = {"unk": "unknown", "pad": "padding"}
    found = {f"tokenizer.ggml.{keys.get(name, name)}_token_id": place for name, place in named.items()}
    others = [place for place in ends if place != named.get("eos")]
    found |= {f"tokenizer.ggml.{name}_token_id": place for name, place in zip(("eot", "eom"), others, strict=False)}
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.get_chat_template()
    found |= {"tokenizer.ggml.add_bos_token": first, "tokenizer.ggml.add_eos_token": last}
    if is_sentencepiece(described):
        special = sentencepiece_metadata(own, tokenizer, _SAMPLES)
    else:
        special = {
            "tokenizer.ggml.model": BYTE_LEVEL,
            "tokenizer.ggml.pre": _pre_tokenizer(own, tokenizer),
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    return special | {"tokenizer.ggml.tokens": tokens} | found


def _described(model: Path, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The model of a fast tokenizer, which must be BPE over bytes, or BPE that falls back to them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    described, parts = content.get("model", {}), content.get("pre_tokenizer") or {}
    kinds = {part.get("type") for part in (parts, *parts.get("pretokenizers", ()))}
    if not is_sentencepiece(described) and (described.get("type") != "BPE" or "ByteLevel" not in kinds):
        raise PartInferError(
            f"{model} has a tokenizer that is neither BPE over bytes nor sentencepiece's BPE, which can't be written to a GGUF "
            "file: export a folder, and use llama.cpp's convert_hf_to_gguf.py"
        )
    return described


def _pre_tokenizer(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first of llama.cpp's pre-tokenizers that gives the tokenizer's tokens for all samples."""
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in _SAMPLES]
    tried = {}
    for name, pre in PRE_TOKENIZERS.items():
        if pre not in tried:
            backend = byte_level(replace(vocabulary, pre=pre))
            tried[pre] = all(
                backend.encode(text, add_special_tokens=False).ids == ids
                for text, ids in zip(_SAMPLES, expected, strict=True)
            )
        if tried[pre] and name != "default":
            return name
    raise PartInferError(
        f"{vocabulary.source} splits text as none of the pre-tokenizers of llama.cpp that are known here: export a folder, "
        "and use llama.cpp's convert_hf_to_gguf.py"
    )


def _plain(value: object) -> object:
    """A metadata value as it is written again."""
    return value.tolist() if hasattr(value, "tolist") else value
