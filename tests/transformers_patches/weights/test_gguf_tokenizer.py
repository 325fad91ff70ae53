"""Tokenizers of GGUF files: words, added tokens, ends of an answer, chat templates."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tests.tiny_gguf import CHAT_TEMPLATE, tiny_model, tokens, write_tiny_gguf
from tests.transformers_patches.weights.gguf_cases import TEXTS, byte_level_vocabulary, sentencepiece_vocabulary
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model, read_config
from transformers_patches.weights.model_files import load_tokenizer

TEXT = "Don't pay $1234.5 for 你好a\n\n  ok"
GPT2 = ["Don", "'t", " pay", " $", "1234", ".", "5", " for", " 你好a", "\n\n ", " ok"]
WORDS = {
    "gpt-2": GPT2,
    "smollm": ["Don", "'t", " pay", " $", "1", "2", "3", "4", ".", "5", " for", " 你好a", "\n\n ", " ok"],
    "llama-bpe": ["Don", "'t", " pay", " $", "123", "4", ".", "5", " for", " 你好a", "\n\n", " ", " ok"],
    "qwen2": ["Don", "'t", " pay", " $", "1", "2", "3", "4", ".", "5", " for", " 你好a", "\n\n", " ", " ok"],
    "tekken": ["Don", "'t", " pay", " $", "1", "2", "3", "4", ".", "5", " for", " 你好a", "\n\n", " ", " ok"],
    "default": ["Don", "'", "t", " pay", " ", "$", "123", "4", ".", "5", " for", " 你好a", "\n\n ", " ok"],
    "falcon": ["Don", "'", "t", " pay", " ", "$", "123", "4", ".", "5", " for", " 你好a", "\n\n ", " ok"],
    "bloom": ["Don't", " pay", " $1234", ".", "5", " for", " 你好a", "\n\n ", " ok"],
    "viking": ["Don't", " pay", " $", "1", "2", "3", "4", ".", "5", " for", " 你好a", "\n\n ", " ok"],
    "deepseek-coder": [
        "Don",
        "'",
        "t",
        " pay",
        " $",
        "1",
        "2",
        "3",
        "4",
        ".",
        "5",
        " for",
        " ",
        "你好",
        "a",
        "\n",
        "\n",
        " ",
        " ok",
    ],
    "deepseek-llm": ["Don", "'", "t", " pay", " $", "1234", ".", "5", " for", " ", "你好", "a", "\n", "\n", " ", " ok"],
    "deepseek-v3": ["Don", "'t", " pay", " $", "123", "4", ".", "5", " for", " ", "你好", "a", "\n\n", " ", " ok"],
    "superbpe": ["Don't pay $", "1", "234", ".", "5", " for 你好a\n\n  ok"],
    "seed-coder": ["Don", "'t", " pay", " $", "1", "2", "3", "4", ".", "5", " for", " 你好a", "\n\n", " ", " ok"],
}


@pytest.fixture
def written(tmp_path):
    """Writes a tiny Llama with this vocabulary."""

    def write(metadata: dict):
        model = tiny_model("llama", vocab_size=len(metadata.get("tokenizer.ggml.tokens", tokens())))
        write_tiny_gguf(tmp_path / "tiny.gguf", model=model, metadata=metadata)
        return tmp_path / "tiny.gguf"

    return write


@pytest.mark.parametrize("pre", WORDS)
def test_words(pre, written):
    tokenizer = load_tokenizer(written({"tokenizer.ggml.pre": pre}))
    backend = tokenizer.backend_tokenizer
    found = [TEXT[slice(*place)] for _, place in backend.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert found == WORDS[pre]
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids) == TEXT


def test_unknown_words_are_refused(written):
    with pytest.raises(
        PartInferError, match="has the pre-tokenizer 'kimi-k2', which is not known here; known are .*qwen2"
    ):
        load_tokenizer(written({"tokenizer.ggml.pre": "kimi-k2"}))
    with pytest.raises(PartInferError, match="a tokenizer of the kind 't5'; gpt2 and llama can be read"):
        load_tokenizer(written({"tokenizer.ggml.model": "t5"}))
    with pytest.raises(PartInferError, match="has no tokenizer"):
        load_tokenizer(written({"tokenizer.ggml.model": "none"}))


@pytest.mark.parametrize(
    ("metadata", "added"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, [1]),
        ({"tokenizer.ggml.pre": "tekken"}, [1]),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, []),
        ({"tokenizer.ggml.pre": "gpt-2"}, []),
        ({"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True}, [1]),
        (
            {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
            [11],
        ),
        ({"tokenizer.ggml.pre": "glm4", "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, []),
    ],
)
def test_first_token(metadata, added, written):
    tokenizer = load_tokenizer(written({"tokenizer.ggml.add_bos_token": None} | metadata))
    assert tokenizer("a").input_ids == [*added, tokens().index("a")]


def test_both_ends_and_the_space_of_sentencepiece(written):
    vocabulary = sentencepiece_vocabulary()
    listed = vocabulary["tokenizer.ggml.tokens"]
    tokenizer = load_tokenizer(written(vocabulary | {"tokenizer.ggml.add_eos_token": True}))
    ids = tokenizer("x").input_ids
    assert (ids[0], ids[-1], listed[ids[1]][0]) == (1, 2, "▁")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x"
    plain = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    tokenizer = load_tokenizer(written(vocabulary | plain))
    assert tokenizer("x").input_ids == [listed.index("x")]
    assert tokenizer.convert_ids_to_tokens(tokenizer("\x07").input_ids) == ["<0x07>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  x").input_ids) == ["x", "  ", "x"]


@pytest.mark.parametrize(
    ("text", "metadata", "ends"),
    [
        ("plain", {}, [2, 0]),
        ("<|eot_id|>", {}, [2, 0, 260]),
        ("<end_of_turn>", {}, [2, 0, 260]),
        ("<|fim_pad|>", {}, [2, 0, 260]),
        ("plain", {"tokenizer.ggml.eot_token_id": 1}, [2, 0, 1]),
        ("plain", {"tokenizer.ggml.eom_token_id": 260}, [2, 0, 260]),
        ("plain", {"tokenizer.ggml.fim_sep_token_id": 260}, [2, 0, 260]),
        ("plain", {"tokenizer.ggml.eos_token_ids": [1, 260]}, [2, 0, 1, 260]),
        ("plain", {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 2**32 - 1}, [1, 0, 2]),
        ("plain", {"tokenizer.ggml.eos_token_id": None}, [11, 0, 2]),
    ],
)
def test_ends_of_an_answer(text, metadata, ends, written):
    listed = [*tokens(), text]
    path = written({"tokenizer.ggml.tokens": listed, "tokenizer.ggml.token_type": None} | metadata)
    assert read_config(path).eos_token_id == ends
    settings = PartInferConfig(method="dense", device="cpu", kernels="torch")
    assert load_model(path, settings).model.generation_config.eos_token_id == ends


@pytest.mark.parametrize(
    ("listed", "ends"),
    [
        (["<|return|>", "<|call|>", "<|end|>"], {"<|return|>", "<|call|>"}),
        (["<|tool_response>", "</s>", "xx"], {"<|tool_response>"}),
        (["<|end|>", "xx", "yy"], {"<|end|>"}),
    ],
)
def test_ends_that_exclude_others(listed, ends, written):
    path = written({"tokenizer.ggml.tokens": [*listed, *tokens()[3:]], "tokenizer.ggml.eos_token_id": 0})
    assert set(load_tokenizer(path).convert_ids_to_tokens(_list(read_config(path).eos_token_id))) == ends


def _list(ids):
    return ids if isinstance(ids, list) else [ids]


def test_chat_templates(written):
    assert load_tokenizer(written({})).chat_template == CHAT_TEMPLATE
    assert load_tokenizer(written({"tokenizer.chat_template": None})).chat_template is None
    both = {"tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_templates": ["default", "tool_use"]}
    tokenizer = load_tokenizer(written(both))
    assert tokenizer.chat_template == {"default": CHAT_TEMPLATE, "tool_use": "tools"}
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize("vocabulary", [byte_level_vocabulary, sentencepiece_vocabulary])
def test_saved_tokenizers_are_the_same(vocabulary, written, tmp_path):
    path = written(vocabulary() | {"tokenizer.ggml.add_bos_token": True})
    tokenizer = load_tokenizer(path)
    tokenizer.save_pretrained(tmp_path / "folder")
    read_config(path).save_pretrained(tmp_path / "folder")
    again = AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in (*TEXTS, "", " x", "<s> <|im_end|> y"):
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.decode(again(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.merges": None}, "has no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["Ġ"]}, "merge 0 of tokenizer.ggml.merges, 'Ġ', must be two tokens"),
        ({"tokenizer.ggml.merges": ["a b"]}, "must be two tokens that make a third"),
        ({"tokenizer.ggml.tokens": ["a"] * 260}, "has a token twice"),
        ({"tokenizer.ggml.tokens": ["a", "b" * 2000]}, "a token of 2000 characters, expected 1024 at most"),
        ({"tokenizer.ggml.tokens": 5}, "tokens must be a list of texts, got '5'"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type must be a list of 260 numbers"),
        ({"tokenizer.ggml.eos_token_id": "end"}, "eos_token_id must be an integer"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token must be true or false"),
        ({"tokenizer.chat_template": 1}, "chat_template must be a text"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, "scores must be a list of 260 numbers"),
    ],
)
def test_damage_is_told_in_one_line(metadata, message, tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(PartInferError, match=message) as raised:
        load_tokenizer(tmp_path / "tiny.gguf")
    assert "tiny.gguf" in str(raised.value)
    assert "\n" not in str(raised.value)
