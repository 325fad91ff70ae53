"""Tiny random models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 2, 64, 96, 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}


def tokens() -> list[str]:
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ĠĠ"]


def tiny_llama() -> LlamaForCausalLM:
    """The Llama that the file holds, in float32 with values that bfloat16 keeps exactly; rms_norm_eps is 1e-05."""
    return tiny_model("llama")


def tiny_model(architecture: str, **fields) -> PreTrainedModel:
    """A random model of one of llama.cpp's architectures. fields: of its config, in place of the usual ones."""
    usual = {
        "vocab_size": len(tokens()),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": 2,
    }
    if architecture.startswith("gemma"):
        usual |= {"query_pre_attn_scalar": HIDDEN // HEADS, "sliding_window": 32}
    config = AutoConfig.for_model(MODEL_TYPES[architecture], **usual | fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    center = 0.0 if architecture.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_((torch.randn_like(parameter) * 0.2 + (center if norm else 0.0)).bfloat16().float())
    return model


def write_gguf(
    path: Path,
    architecture: str,
    tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]],
    numbers: dict[str, int],
) -> None:
    """A file with only these (packed) tensors and settings of the architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in ({"attention.head_count": 1} | numbers).items():
        writer.add_uint32(f"{architecture}.{name}", value)
    for name, (packed, kind) in tensors.items():
        writer.add_tensor(name, packed, raw_dtype=kind)
    _write(writer)


def tiny_metadata(model: PreTrainedModel) -> dict[str, object]:
    """What llama.cpp's converter says about a tiny model, without its RoPE scaling."""
    config = model.config
    name = {value: key for key, value in MODEL_TYPES.items()}[config.model_type]
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    found = {
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": config.head_dim,
        f"{name}.attention.value_length": config.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{name}.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        f"{name}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens(),
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens()) - 3),
        "tokenizer.ggml.merges": ["Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if name.startswith("gemma"):
        found[f"{name}.attention.sliding_window"] = config.sliding_window
        if config.final_logit_softcapping:
            found[f"{name}.final_logit_softcapping"] = float(config.final_logit_softcapping)
    if name == "gemma2":
        found["gemma2.attn_logit_softcapping"] = float(config.attn_logit_softcapping)
    return found


def tiny_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A tiny model's weights as llama.cpp's converter stores them, by its names."""
    config = model.config
    gemma = config.model_type.startswith("gemma")
    names = GEMMA_NAMES if gemma else NAMES
    found = {}
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                found["output.weight"] = weight
            continue
        if parts[1] == "layers":
            short = f"blk.{parts[2]}.{names['.'.join(parts[3:-1])]}.{parts[-1]}"
        else:
            short = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight"
        if gemma and short.endswith("norm.weight"):
            weight = weight + 1
        if config.model_type == "llama" and ("attn_q." in short or "attn_k." in short):
            heads = config.num_attention_heads if "attn_q." in short else config.num_key_value_heads
            weight = _interleave(weight, heads)
        found[short] = weight
    return found


def write_tiny_gguf(
    path: Path,
    kind: str = "F32",
    model: PreTrainedModel | None = None,
    rope_factors: torch.Tensor | None = None,
    metadata: dict[str, object] | None = None,
    tensors: dict[str, torch.Tensor | None] | None = None,
) -> None:
    """A tiny model's file. kind: the type of the projections of attention and FFNs; the rest is F32, as in real files.

    metadata, tensors: more of them, or others; None takes one away.
    """
    model = tiny_llama() if model is None else model
    stored = (
        tiny_tensors(model) | ({} if rope_factors is None else {"rope_freqs.weight": rope_factors}) | (tensors or {})
    )
    architecture = {value: key for key, value in MODEL_TYPES.items()}[model.config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (tiny_metadata(model) | (metadata or {})).items():
        if value is not None and key != "general.architecture":
            add_value(writer, key, value)
    for name, weight in stored.items():
        if weight is not None:
            projection = weight.ndim > 1 and name.startswith("blk.")
            _add(writer, name, weight, kind if projection else "F32")
    _write(writer)


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """A key with the GGUF type that files have for such a value: integers are uint32."""
    if isinstance(value, (list, tuple)):
        writer.add_array(key, value)
    else:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, kind: str) -> None:
    if kind == "F32":
        writer.add_tensor(name, weight.numpy())
        return
    packed = gguf.quants.quantize(weight.numpy(), GGMLQuantizationType[kind])
    writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType[kind])


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves to pairs, as llama.cpp wants them: [heads·d, H] with rows 0, d/2, 1, d/2+1, … of each head."""
    return weight.view(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()
