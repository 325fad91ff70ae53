"""Text in pieces: together they are what the tokenizer makes of all ids at once, for every kind of decoder."""

from __future__ import annotations

from types import MethodType

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from transformers_patches.generation.text import CONTEXT, AnswerText, TextDecoder

SPECIAL = ["<s>", "</s>", "<|eot|>"]
WORDS = [
    "▁",
    "▁▁▁▁",
    "if",
    "▁x",
    "y",
    ".",
    "▁.",
    "'",
    "▁'",
    "▁n",
    "'t",
    "s",
    "é",
    "日",
    "�",
    "\n",
    "▁re",
    "long" * CONTEXT,
]
BYTES = [f"<0x{b:02X}>" for b in range(256)]
STRIPPING = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def made(model, decoder, **options) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.decoder = decoder
    backend.add_tokens([AddedToken("<think>", special=False)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|eot|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)


def bpe(words: list[str]) -> models.BPE:
    return models.BPE({word: i for i, word in enumerate([*SPECIAL, *words])}, [], byte_fallback=True)


def word_level(words: list[str]) -> models.WordLevel:
    return models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<s>")


def byte_level() -> PreTrainedTokenizerFast:
    letters = bytes_to_unicode()
    texts = [bytes([b]) for b in range(256)] + [
        "日".encode(),
        "日".encode()[:2],
        " 🤗".encode()[:3],
        b"    ",
        b"ab",
    ]
    return made(bpe(list(dict.fromkeys("".join(letters[b] for b in text) for text in texts))), decoders.ByteLevel())


def metaspace(**options) -> PreTrainedTokenizerFast:
    return made(models.Unigram([(w, 0.0) for w in [*SPECIAL, *WORDS]], 0), decoders.Metaspace(), **options)


def byte_fallback() -> PreTrainedTokenizerFast:
    return made(bpe(BYTES + WORDS), decoders.Sequence([*STRIPPING, decoders.Strip(" ", 1, 0)]))


TOKENIZERS = {
    "byte-level": byte_level(),
    "metaspace": metaspace(),
    "byte fallback": byte_fallback(),
    "spaces removed before punctuation": metaspace(clean_up_tokenization_spaces=True),
    "three spaces stripped": made(bpe(BYTES + WORDS), decoders.Sequence([*STRIPPING, decoders.Strip(" ", 3, 0)])),
    "byte fallback, nothing stripped": made(bpe(BYTES + WORDS), decoders.Sequence(STRIPPING)),
    "no decoder": made(word_level(WORDS), None),
    "word pieces": made(word_level([*WORDS, "##a", "##."]), decoders.WordPiece()),
    "end-of-word suffix": made(word_level([*WORDS, "a</w>"]), decoders.BPEDecoder()),
    "not known: repeats are dropped": made(word_level(WORDS), decoders.CTC()),
}


def ids_of(tokenizer) -> st.SearchStrategy[list[int]]:
    """Any ids, those of special tokens and one that is no token's among them; often a few of them again and again."""
    some = st.integers(0, len(tokenizer))
    few = st.lists(some, min_size=1, max_size=4).flatmap(lambda few: st.lists(st.sampled_from(few), max_size=60))
    return st.lists(some, max_size=60) | few


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    decoder = TextDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids if decoder.special(token) is None), decoder.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_pieces_make_up_the_text_of_all_ids(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(ids_of(tokenizer))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_the_answer_is_that_text_up_to_the_first_stop_string(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(ids_of(tokenizer).filter(lambda ids: len(ids) > 0))
    whole = tokenizer.decode([i for i in ids if i > 2])
    at = data.draw(st.integers(0, len(whole)))
    stop = whole[at : at + data.draw(st.integers(1, 5))]
    assume(not set(stop) & set("".join(SPECIAL)))
    got = []
    answer = AnswerText(tokenizer, (stop,) if stop else (), got.append)
    used = next((n for n, token in enumerate(ids, 1) if answer.push(token)), len(ids))
    answer.finish()
    seen = tokenizer.decode(ids[:used], skip_special_tokens=True)
    assert "".join(got) == answer.text == (seen.split(stop)[0] if stop else seen)
    assert answer.stopped == (stop != "" and stop in seen)


def encoded(tokenizer, *tokens: str) -> list[int]:
    return [tokenizer.backend_tokenizer.token_to_id(token) for token in tokens]


def answer_to(tokenizer, tokens: list[str], *stop: str) -> tuple[list[str], str, bool]:
    """What comes token by token, the text, whether a stop string ended it."""
    got, answer = [], AnswerText(tokenizer, stop)
    for token in encoded(tokenizer, *tokens):
        before = len(answer.text)
        ended = answer.push(token)
        got.append(answer.text[before:])
        if ended:
            break
    answer.finish()
    return got, answer.text, answer.stopped


def test_text_comes_as_soon_as_it_is_certain():
    fallback = TOKENIZERS["byte fallback"]
    code = ["if", "▁x", "\n", "▁▁▁▁", "y"]
    assert answer_to(fallback, code) == (["if", " x", "\n", "    ", "y"], "if x\n    y", False)
    character = ["y", "<0xE6>", "<0x97>", "<0xA5>", "s"]  # 日
    assert answer_to(fallback, character)[0] == ["y", "", "", "", "日s"]
    assert answer_to(fallback, character[:-1])[1] == "y日"
    letters = bytes_to_unicode()
    split = ["a", *(letters[b] for b in "日".encode()), "b"]
    assert answer_to(TOKENIZERS["byte-level"], split)[0] == ["a", "", "", "日", "b"]


def test_a_stop_string_ends_as_soon_as_it_is_complete():
    fallback = TOKENIZERS["byte fallback"]
    assert answer_to(fallback, ["y", "<0x0A>", "s"], "\n") == (["y", ""], "y", True)  # not a token later
    assert answer_to(fallback, ["y", "s", "é", "y"], "séy") == (["y", "", "", ""], "y", True)
    assert answer_to(fallback, ["y", "s", "é", "é"], "séy")[0] == ["y", "", "", "séé"]


@pytest.mark.parametrize(
    "stop, text",
    [("<|eot|>", "ys"), ("s<|eot|>", "y"), ("<|eot|>é", "ys"), ("|eot", "ys"), ("<|eot|></s>", None), ("sé", "y")],
)
def test_special_tokens_are_found_by_their_text(stop, text):
    got, answer, stopped = answer_to(TOKENIZERS["byte fallback"], ["y", "s", "<|eot|>", "é", "y"], stop)
    assert (answer, stopped) == ((text, True) if text is not None else ("yséy", False))


def test_a_special_token_within_a_character_leaves_it_whole():
    tokens = ["y", "<0xE6>", "<|eot|>", "<0x97>", "<0xA5>", "s"]
    assert answer_to(TOKENIZERS["byte fallback"], tokens, "never")[1] == "y日s"
    assert answer_to(TOKENIZERS["byte fallback"], tokens, "<|eot|>")[1:] == ("y", True)


def test_a_tokenizer_with_a_decode_of_its_own_gives_all_text_in_the_end():
    class Own(PreTrainedTokenizerFast):
        def _decode(self, token_ids, **options):
            return "".join(reversed(super()._decode(token_ids, **options)))

    tokenizer = Own(tokenizer_object=TOKENIZERS["metaspace"].backend_tokenizer)
    ids = encoded(tokenizer, "y", "s", "é")
    assert pieces_of(tokenizer, ids) == ["", "", "", "ésy"]


def test_long_texts_cost_no_more_a_token():
    tokenizer, most = TOKENIZERS["byte-level"], 0
    decoder = TextDecoder(tokenizer)
    decode = decoder._decode

    def counted(_self, ids):
        nonlocal most
        most = max(most, len(ids))
        return decode(ids)

    decoder._decode = MethodType(counted, decoder)
    pieces = [decoder.push(token) for token in encoded(tokenizer, *"ab" * 500)]
    assert "".join(pieces) == "ab" * 500
    assert most <= 3 * CONTEXT
