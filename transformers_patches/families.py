"""Where an architecture keeps its FFN weights, and its activation.

Another family is one more entry in FAMILIES. The neuron axis is dimension 0 of the input projections (`gate_proj`,
`up_proj`, `fc1`) and dimension 1 of the output projection (`down_proj`, `fc2`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from transformers_patches.errors import PartInferError


@dataclass(frozen=True)
class FFNSpec:
    """The FFN of one decoder layer.

    layers: path of the layer list inside the model; ffn: path of the FFN module inside a layer, empty if its
    projections are children of the layer itself; gate: the gate projection, None for a plain FFN; up, down: the
    other projections (`fc1`, `fc2` of a plain FFN); activation_field: the config field that names the activation;
    size_field: the config field that holds N; activation_module: the layer's own activation, made an identity
    when a plain FFN is replaced; norm: a norm of every layer, which identifies a trained model.
    """

    layers: str = "model.layers"
    ffn: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation_field: str = "hidden_act"
    size_field: str = "intermediate_size"
    activation_module: str | None = None
    norm: str = "post_attention_layernorm"

    @property
    def gated(self) -> bool:
        return self.gate is not None

    def intermediate_size(self, config: PretrainedConfig) -> int:
        """N, the FFN neurons of one layer."""
        return getattr(config, self.size_field)

    def activation(self, config: PretrainedConfig) -> str:
        """The activation's name in transformers' ACT2FN."""
        return getattr(config, self.activation_field)

    def projection(self, layer: int, name: str) -> str:
        """The parameter prefix of a projection, such as `model.layers.3.mlp.up_proj`."""
        return ".".join(part for part in (self.layers, str(layer), self.ffn, name) if part)

    def inputs(self) -> dict[str, tuple[str, ...]]:
        """Which children of a decoder layer have the same input, by its name in the neuron file's INPUT_SQUARES.

        Not all of them need to be there.
        """
        ffn = tuple(".".join(part for part in (self.ffn, name) if part) for name in (self.gate, self.up) if name)
        attention = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
        return {
            "attention": attention,
            "attention_output": ("self_attn.o_proj", "self_attn.out_proj"),
            "ffn": ffn,
        }

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        return model.get_submodule(self.layers)

    def ffn_module(self, model: nn.Module, layer: int) -> nn.Module:
        """The module whose children are the projections of a layer."""
        return model.get_submodule(".".join(part for part in (self.layers, str(layer), self.ffn) if part))

    def down_projection(self, model: nn.Module, layer: int) -> nn.Linear:
        """The output projection; what enters it is the activation h of every neuron."""
        return getattr(self.ffn_module(model, layer), self.down)


_GATED = FFNSpec()
_GATED_GEMMA = FFNSpec(activation_field="hidden_activation")

FAMILIES: dict[str, FFNSpec] = {
    "llama": _GATED,  # SmolLM2 too
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": _GATED_GEMMA,
    "gemma3_text": _GATED_GEMMA,
    "opt": FFNSpec(
        layers="model.decoder.layers",
        ffn="",
        gate=None,
        up="fc1",
        down="fc2",
        activation_field="activation_function",
        size_field="ffn_dim",
        activation_module="activation_fn",
        norm="final_layer_norm",
    ),
}


def ffn_spec(config: PretrainedConfig) -> FFNSpec:
    """The FFNSpec of a model's config; PartInferError lists the known architectures."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        raise PartInferError(
            f"unknown architecture {config.model_type!r}; known are {', '.join(sorted(FAMILIES))}: "
            "add an FFNSpec to transformers_patches/families.py"
        ) from None
