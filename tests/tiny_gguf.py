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


def tiny_model(architecture: str) -> PreTrainedModel:
    """A random model of one of llama.cpp's architectures."""
    config = AutoConfig.for_model(
        MODEL_TYPES[architecture],
        vocab_size=len(tokens()),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
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


def write_tiny_gguf(
    path: Path,
    kind: str = "F32",
    model: PreTrainedModel | None = None,
    rope_factors: torch.Tensor | None = None,
) -> None:
    """A tiny model's file. kind: the type of the projections of attention and FFNs; the rest is F32, as in real files."""
    model = tiny_llama() if model is None else model
    architecture = {value: key for key, value in MODEL_TYPES.items()}[model.config.model_type]
    gemma = architecture.startswith("gemma")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_value_length(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(model.config.rope_parameters.get("rope_theta", 10000.0))
    writer.add_vocab_size(len(tokens()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens()) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    names = GEMMA_NAMES if gemma else NAMES
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        if name == "lm_head.weight":
            continue  # tied
        if parts[1] == "layers":
            short = f"blk.{parts[2]}.{names['.'.join(parts[3:-1])]}.{parts[-1]}"
        else:
            short = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight"
        if gemma and short.endswith("norm.weight"):
            weight = weight + 1
        if architecture == "llama" and ("attn_q." in short or "attn_k." in short):
            weight = _interleave(weight, HEADS if "attn_q." in short else KV_HEADS)
        _add(writer, short, weight, kind if "_proj" in name and weight.ndim > 1 else "F32")
    _write(writer)


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
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width).contiguous()
