"""Settings and vocabularies of tiny GGUF files, each with what it stands for in transformers."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

from tests.tiny_gguf import tiny_model, write_tiny_gguf

FACTORS = torch.linspace(1, 3, 8)
THETA = 10000.0
BIAS = {"q": torch.linspace(-0.5, 0.5, 64), "k": torch.linspace(-1, 1, 32), "v": torch.linspace(0, 1, 32)}


def _longrope(short, long=None, attention=1.0, original=256) -> dict:
    parts = {"short_factor": short.tolist(), "long_factor": (short if long is None else long).tolist(), "factor": 1.0}
    more = {"attention_factor": attention, "original_max_position_embeddings": original}
    return {"rope_type": "longrope", "rope_theta": THETA} | parts | more


def _yarn(factor, original, **more) -> dict:
    return {
        "rope_type": "yarn",
        "rope_theta": THETA,
        "factor": factor,
        "original_max_position_embeddings": original,
    } | more


@dataclass(frozen=True)
class Case:
    """A file of a model with `fields`, but with `metadata` and `tensors`; it stands for `rope` or `meant` in the config."""

    name: str
    architecture: str
    metadata: dict = field(default_factory=dict)
    meant: dict = field(default_factory=dict)
    fields: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)

    def write(self, path: Path) -> None:
        metadata = {f"{self.architecture}.{key}": value for key, value in self.metadata.items()}
        model = tiny_model(self.architecture, **self.fields)
        write_tiny_gguf(path, model=model, metadata=metadata, tensors=self.tensors)

    def reference(self) -> PreTrainedModel:
        """transformers' model; biases that `tensors` add are set."""
        model = tiny_model(self.architecture, **self.fields | self.meant)
        weights = tiny_model(self.architecture, **self.fields).state_dict()
        biases = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if name not in weights}
        model.load_state_dict(weights | biases)
        places = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
        for name, value in self.tensors.items():
            if not name.startswith("blk."):
                continue
            _, layer, place, kind = name.split(".")
            target = model.get_parameter(f"model.layers.{layer}.{places.get(place, 'mlp.down_proj')}.{kind}")
            if value is None:
                target.data.zero_()
            elif place in ("attn_q", "attn_k") and self.architecture == "llama":  # pairs, not halves
                heads = len(value) // 16
                target.data.copy_(value.view(heads, 8, 2).transpose(1, 2).reshape(-1))
            else:
                target.data.copy_(value)
        return model


def _biases(names: str) -> dict[str, torch.Tensor]:
    return {f"blk.{layer}.attn_{name}.bias": BIAS[name] for layer in (0, 1) for name in names}


def _gemma3_rope(full: dict, local: float = THETA) -> dict:
    return {
        "rope_parameters": {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    }


SEVEN = {"num_hidden_layers": 7}
GLOBAL = {"rope_type": "default", "rope_theta": 1e6}
CONFIGS = [
    Case("plain", "llama"),
    Case("base", "llama", {"rope.freq_base": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    Case("no base", "llama", {"rope.freq_base": None}),
    Case(
        "linear by default",
        "llama",
        {"rope.scaling.factor": 4.0},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}},
    ),
    Case(
        "the old key",
        "llama",
        {"rope.scale_linear": 2.0},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 2.0}},
    ),
    Case("none", "llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    Case(
        "yarn",
        "qwen2",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
        {"rope_parameters": _yarn(4.0, 64)},
    ),
    Case(
        "yarn over the whole context",
        "qwen3",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0},
        {"rope_parameters": _yarn(8.0, 256)},
    ),
    Case(
        "yarn and attention factor",
        "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5},
        {"rope_parameters": _yarn(2.0, 256, attention_factor=1.5 * 1.0693147180559945)},
    ),
    Case(
        "attention factor",
        "llama",
        {"rope.scaling.attn_factor": 1.25},
        {"rope_parameters": _longrope(FACTORS / FACTORS, attention=1.25)},
    ),
    Case("factors", "llama", {}, {"rope_parameters": _longrope(FACTORS)}, tensors={"rope_freqs.weight": FACTORS}),
    Case(
        "factors and linear",
        "llama",
        {"rope.scaling.factor": 2.0},
        {"rope_parameters": _longrope(2 * FACTORS)},
        tensors={"rope_freqs.weight": FACTORS},
    ),
    *(
        Case(
            f"longrope, {name}",
            "llama",
            {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": original},
            {"rope_parameters": _longrope(FACTORS, 2 * FACTORS, original=original)},
            tensors={"rope_factors_short.weight": FACTORS, "rope_factors_long.weight": 2 * FACTORS},
        )
        for name, original in (("short", 256), ("long", 64))
    ),
    Case("heads in an array", "llama", {"attention.head_count_kv": [2, 2]}),
    Case("lengths of heads left out", "llama", {"attention.key_length": None, "attention.value_length": None}),
    Case("long heads", "qwen3", fields={"head_dim": 32}),
    Case("norm", "llama", {"attention.layer_norm_rms_epsilon": 0.01}, {"rms_norm_eps": 0.01}),
    Case("bias of queries", "llama", {}, {"attention_bias": True}, tensors=_biases("q")),
    Case("bias of one down", "llama", {}, {"mlp_bias": True}, tensors={"blk.1.ffn_down.bias": BIAS["q"]}),
    Case("no biases", "qwen2", tensors=dict.fromkeys(_biases("qkv"))),
    Case("biases of queries, keys, values", "qwen3", {}, {"attention_bias": True}, tensors=_biases("qkv")),
    Case("own head", "llama", fields={"tie_word_embeddings": False}),
    Case("gemma2", "gemma2"),
    Case(
        "gemma2 without settings",
        "gemma2",
        {"final_logit_softcapping": None, "attn_logit_softcapping": None, "attention.sliding_window": None},
        {"sliding_window": 4096},
    ),
    Case(
        "softcaps",
        "gemma2",
        {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 7.0},
        {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 7.0},
    ),
    Case(
        "the largest gemma2",
        "gemma2",
        {},
        {"query_pre_attn_scalar": 16},
        {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 32},
    ),
    Case(
        "the largest gemma3",
        "gemma3",
        {},
        {"query_pre_attn_scalar": 16},
        {"num_hidden_layers": 62, "head_dim": 32, "query_pre_attn_scalar": 32},
    ),
    Case("gemma3", "gemma3", fields=SEVEN),
    Case(
        "gemma3 without a base",
        "gemma3",
        {"rope.freq_base": None},
        _gemma3_rope({"rope_type": "default", "rope_theta": THETA}),
        SEVEN,
    ),
    Case("base of windows", "gemma3", {"rope.freq_base_swa": 2e4}, _gemma3_rope(GLOBAL, 2e4), SEVEN),
    Case(
        "gemma3 linear",
        "gemma3",
        {"rope.scaling.factor": 8.0},
        _gemma3_rope(GLOBAL | {"rope_type": "linear", "factor": 8.0}),
        SEVEN,
    ),
    Case(
        "period of windows",
        "gemma3",
        {"attention.sliding_window_pattern": 2},
        {"layer_types": (["sliding_attention", "full_attention"] * 4)[:7]},
        SEVEN,
    ),
    Case(
        "windows by layer",
        "gemma3",
        {"attention.sliding_window_pattern": [True, False, False, True]},
        {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
        {"num_hidden_layers": 4},
    ),
    Case("no windows", "gemma3", {"attention.sliding_window": None}, {"layer_types": ["full_attention"] * 7}, SEVEN),
    Case("softcap of gemma3", "gemma3", {"final_logit_softcapping": 5.0}, {"final_logit_softcapping": 5.0}),
]

TEXTS = [
    "In 1923, 24 people said: «Größe» don't I'LL 12345678 $5.00 x=y+1; foo_bar(a,b)\n\n  indented\tline\r\n end  ",
    "日本語のテキスト、中文字符。한국어 텍스트 हिन्दी ไทย العربية ١٢٣ русский Текст ÉCOLE éÉa aÉb",
    "  leading   spaces\n\n\n\nnew lines \n x\n",
    "emoji 😀👍🏽 math ∑∫≤ ½ Ⅻ ² 3.14e-10 http://a.b/c?d=e&f=g <tag attr='v'> `code` ~~ ^^ || @#%",
    "HelloWorld camelCase snake_case UPPER MiXeD ǅ ʰ 's 'T 'RE don'T we'Ve I'd'm",
    "\u3000全角　スペース！？：；“quoted” …— end 100 1000 10000 100000 1000000 1234567890",
    "a\u0301e\u0308 naïve café\u00a0nbsp\u2028ls \u200bzw 'g بทßL\u2028C、국व«* —A~∑",
]


@functools.cache
def byte_level_vocabulary() -> dict:
    """Merges that reach across words, so that another split gives other tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    listed = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(model["vocab"], key=model["vocab"].get)]
    return {
        "tokenizer.ggml.tokens": listed,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(listed) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
    }


@functools.cache
def sentencepiece_vocabulary() -> dict:
    """Bytes, control tokens, two that users defined, and pieces of TEXTS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=700, min_frequency=2, show_progress=False, special_tokens=["<unk>"])
    tokenizer.train_from_iterator([("▁" + text).replace(" ", "▁") for text in TEXTS * 3], trainer)
    vocabulary = tokenizer.get_vocab()
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<end_of_turn>", "  ", "\n\n"]
    pieces = [piece for piece in sorted(vocabulary, key=vocabulary.get) if piece not in first]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": first + pieces,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [3, 4, 4] + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * len(first) + [-float(place) for place in range(len(pieces))],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_bos_token": None,
    }
