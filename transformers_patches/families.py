"""What each architecture looks like: the one place where a new family of models is added.

A family is an entry of FAMILIES: what its models call the parts that PartInfer reads, replaces or computes natively,
and what sets it apart from Llama, whose layout the defaults are. An architecture without an entry is looked at instead
(`structure/`), and runs in transformers' own layers. The neuron axis is dimension 0 of the FFN's input projections
(`gate`, `up`) and dimension 1 of its output projection (`down`).

Nothing heavy is imported here: transformers and torch are only needed once there is a model to look at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from transformers_patches.errors import PartInferError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from transformers_patches.structure.experts_layout import ExpertsLayout
    from transformers_patches.structure.model_structure import ModelStructure


@dataclass(frozen=True)
class GGUFLayout:
    """How llama.cpp keeps a family's weights in a GGUF file."""

    architecture: str  # `general.architecture` of the file
    rotary_pairs: bool = False  # rows of q and k lie in rotary pairs; transformers has two halves of a head


@dataclass(frozen=True)
class Family:
    """The architecture of a `model_type` in transformers. Paths are of modules, relative to what the comment names."""

    # The decoder
    decoder: str = "model"  # in the model: what has the embeddings, the layers and the last norm
    embedding: str = "embed_tokens"  # in the decoder
    layer_list: str = "layers"  # in the decoder
    last_norm: str = "norm"  # in the decoder: the norm after the last layer
    learned_positions: str | None = None  # in the decoder: embeddings of positions; None: rotary (`rotary_emb`)
    norm_offset: float = 0.0  # what norms add to their weights
    native_decoder: bool = False  # layers are norm, attention, residual, norm, FFN, residual, with no factor anywhere

    # A layer's attention and norms
    attention: str = "self_attn"  # in the layer
    attention_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # in the attention
    attention_output: str = "o_proj"  # in the attention
    attention_norm: str = "input_layernorm"  # in the layer: before the attention
    ffn_norm: str = "post_attention_layernorm"  # in the layer: before the FFN
    attention_post_norm: str | None = None  # in the layer: of the attention's output, if there is one
    ffn_post_norm: str | None = None  # in the layer: of the FFN's output, if there is one
    window_in_config: bool = False  # the sliding window is the config's for all layers, not each attention's own

    # A layer's FFN
    ffn: str = "mlp"  # in the layer: what has the projections; empty: they are the layer's own children
    gate: str | None = (
        "gate_proj"  # in the FFN; None: a plain FFN; the same as `up`: one projection has the rows of both
    )
    up: str = "up_proj"  # in the FFN: the first projection of a plain FFN
    down: str = "down_proj"  # in the FFN
    activation_module: str = "act_fn"  # in the FFN
    activation_field: str = "hidden_act"  # in the config: the activation's name in transformers' ACT2FN
    size_field: str = "intermediate_size"  # in the config: N

    # Files
    fingerprint_norm: str | None = None  # in the layer: the norm that neuron files know a model by; None: `ffn_norm`
    gguf: GGUFLayout | None = None  # None: GGUF files of the family can't be read

    # Of an architecture without an entry
    found: ModelStructure | None = field(default=None, repr=False)

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def fused(self) -> bool:
        """Whether one projection has the rows of gate and of up."""
        return self.gate == self.up

    @property
    def matrices(self) -> int:
        """Rows of weights that a neuron has."""
        return 3 if self.gated else 2

    @property
    def whole_layers(self) -> Mapping[int, str]:
        """Layers that can't be computed by neurons, and why."""
        return {} if self.found is None else self.found.whole

    @property
    def layers(self) -> str:
        """Path of the layer list inside the model."""
        return f"{self.decoder}.{self.layer_list}"

    @property
    def embeddings(self) -> str:
        """Path of the embeddings inside the model."""
        return f"{self.decoder}.{self.embedding}"

    @property
    def ffn_inputs(self) -> tuple[str, ...]:
        """The FFN's projections whose rows are neurons."""
        return (self.up,) if self.gate is None or self.fused else (self.gate, self.up)

    @property
    def ffn_children(self) -> tuple[str, ...]:
        """The children of a layer that are its FFN, in the order in which the layer calls them."""
        return (self.ffn,) if self.ffn else (self.up, self.activation_module, self.down)

    @property
    def identifying_norm(self) -> str:
        """The norm of a layer whose weights identify a trained model."""
        return self.fingerprint_norm or self.ffn_norm

    def intermediate_size(self, config: PretrainedConfig) -> int:
        """N, the FFN neurons of one layer; PartInferError if no layer can be computed by neurons."""
        if self.found is None:
            return getattr(config, self.size_field)
        if self.found.layout is None:
            also = "" if self.experts is None else ", or --selection up --loaded_neurons_percent 1"
            raise PartInferError(
                f"{config.model_type} can't be computed by neurons: {self.found.whole[0]}; use --method dense{also}"
            )
        return self.found.layout.size

    def ffn_neurons(self, config: PretrainedConfig) -> int:
        """N; 0 if no layer can be computed by neurons."""
        return self.intermediate_size(config) if len(self.whole_layers) < config.num_hidden_layers else 0

    @property
    def experts(self) -> ExpertsLayout | None:
        """The layout of its mixtures of experts; None if it has none that is known."""
        return None if self.found is None else self.found.experts_layout

    def expert_layers(self, num_layers: int) -> list[int]:
        """Those with experts of that layout."""
        if self.experts is None:
            return []
        return [layer for layer in range(num_layers) if layer in self.found.mixtures]

    def has_neurons(self, layer: int) -> bool:
        """Whether a layer's FFN can be computed by neurons."""
        return layer not in self.whole_layers

    def activation_of(self, module: nn.Module, config: PretrainedConfig) -> str | nn.Module:
        """The activation of an FFN: its name in ACT2FN, or a module where it has none there."""
        return self.activation(config) if self.found is None else self.found.layout.activation_of(module)

    def row_ranges(self, config: PretrainedConfig) -> dict[str, tuple[str, int | None]]:
        """For `up`, and `gate` if there is one: the projection that has its rows, and the first; None: it has no others."""
        inputs = {"up": self.up} if self.gate is None else {"up": self.up, "gate": self.gate}
        if not self.fused:
            return {name: (projection, None) for name, projection in inputs.items()}
        size = self.intermediate_size(config)
        first = {"gate": 0, "up": size} if self.found.layout.gate_first else {"up": 0, "gate": size}
        return {name: (projection, first[name]) for name, projection in inputs.items()}

    def activation(self, config: PretrainedConfig) -> str:
        """The activation's name in transformers' ACT2FN."""
        return getattr(config, self.activation_field)

    def sliding_window(self, attention: nn.Module, config: PretrainedConfig) -> int:
        """How many tokens one layer's attention sees; 0: all."""
        return getattr(config if self.window_in_config else attention, "sliding_window", None) or 0

    def name_in_model(self, stored: str) -> str:
        """The name of a parameter from that in a checkpoint's files, which may be an earlier one."""
        for renaming in () if self.found is None else self.found.renamings:
            stored, _ = renaming.rename_source_key(stored)
        base = self.decoder.partition(".")[0]
        return stored if stored.startswith((f"{base}.", "lm_head.")) else f"{base}.{stored}"

    def expert_part(self, name: str) -> str:
        """What a tensor of one expert is of the tensor that has all experts' (`weights/parts.py`); others stay as they are."""
        layout = self.experts
        for whole, patterns in () if layout is None else self.found.stacked.items():
            for number, pattern in enumerate(patterns):
                match = re.search(r"(?<!\w)" + re.escape(pattern).replace(r"\*", r"(\d{1,6})") + "$", name)
                if match:
                    rows = layout.size if len(patterns) > 1 else layout.hidden
                    first = (int(match[1]) * len(patterns) + number) * rows
                    return f"{name[: match.start()]}{whole}[{first}:{first + rows}]"
        return name

    def in_ffn(self, name: str) -> str:
        """Path of a projection inside a layer, such as `mlp.up_proj`."""
        return f"{self.ffn}.{name}" if self.ffn else name

    def projection(self, layer: int, name: str) -> str:
        """The parameter prefix of a projection, such as `model.layers.3.mlp.up_proj`."""
        return f"{self.layers}.{layer}.{self.in_ffn(name)}"

    def inputs(self) -> dict[str, tuple[str, ...]]:
        """Which children of a layer have the same input, by its name in the neuron file's INPUT_SQUARES."""
        return {
            "attention": tuple(f"{self.attention}.{name}" for name in self.attention_inputs),
            "attention_output": (f"{self.attention}.{self.attention_output}",),
            "ffn": tuple(self.in_ffn(name) for name in self.ffn_inputs),
        }

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        return model.get_submodule(self.layers)

    def ffn_module(self, model: nn.Module, layer: int) -> nn.Module:
        """The module whose children are the projections of a layer."""
        return self.decoder_layers(model)[layer].get_submodule(self.ffn)

    def down_projection(self, model: nn.Module, layer: int) -> nn.Linear:
        """The output projection; what enters it is the activation h of every neuron."""
        return getattr(self.ffn_module(model, layer), self.down)

    def swap_ffn(self, layer: nn.Module, new: nn.Module) -> dict[str, nn.Module]:
        """Put a module in the place of a layer's FFN; returns the children that were there, by their names.

        Where the projections are the layer's own children, the first becomes the FFN and those after it do nothing.
        """
        from torch import nn

        originals = {name: layer.get_submodule(name) for name in self.ffn_children}
        for name in originals:
            layer.set_submodule(name, new if name == self.ffn_children[0] else nn.Identity())
        return originals

    def fits_native_decoder(self, model: PreTrainedModel) -> bool:
        """Whether the native decoder knows a model's layers.

        Some models are not built as their family usually is: OPT-350m has its norms elsewhere and projects its
        embeddings, others have norms without weights.
        """
        if not self.native_decoder:
            return False
        decoder = model.get_submodule(self.decoder)
        norms = [getattr(layer, name) for layer in decoder.layers for name in (self.attention_norm, self.ffn_norm)]
        norms.append(getattr(decoder, self.last_norm))  # None in some models
        norms_before = getattr(model.config, "do_layer_norm_before", True)
        projects = getattr(decoder, "project_in", None) is not None
        return norms_before and not projects and all(n is not None and n.weight is not None for n in norms)

    def gguf_names(self) -> dict[str, str]:
        """Names in a GGUF file -> names in the model, without `.weight`: of a block's tensors those in a layer."""
        queries, keys, values = self.attention_inputs
        layer = {
            "attn_norm": self.attention_norm,
            "attn_q": f"{self.attention}.{queries}",
            "attn_k": f"{self.attention}.{keys}",
            "attn_v": f"{self.attention}.{values}",
            "attn_output": f"{self.attention}.{self.attention_output}",
            "attn_q_norm": f"{self.attention}.q_norm",
            "attn_k_norm": f"{self.attention}.k_norm",
            "post_attention_norm": self.attention_post_norm,
            "ffn_norm": self.ffn_norm,
            "ffn_gate": self.gate and self.in_ffn(self.gate),
            "ffn_up": self.in_ffn(self.up),
            "ffn_down": self.in_ffn(self.down),
            "post_ffw_norm": self.ffn_post_norm,
        }
        outside = {
            "token_embd": self.embeddings,
            "output_norm": f"{self.decoder}.{self.last_norm}",
            "output": "lm_head",
        }
        return outside | {f"blk.{name}": place for name, place in layer.items() if place}


_POST_NORMS = {  # Gemma 2 and 3
    "ffn_norm": "pre_feedforward_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
    "fingerprint_norm": "post_attention_layernorm",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(native_decoder=True, gguf=GGUFLayout("llama", rotary_pairs=True)),  # SmolLM2
    "mistral": Family(
        native_decoder=True,
        window_in_config=True,
        gguf=GGUFLayout("llama", rotary_pairs=True),
    ),
    "qwen2": Family(native_decoder=True, gguf=GGUFLayout("qwen2")),
    "qwen3": Family(native_decoder=True, gguf=GGUFLayout("qwen3")),
    "gemma": Family(norm_offset=1.0, gguf=GGUFLayout("gemma")),
    "gemma2": Family(norm_offset=1.0, activation_field="hidden_activation", gguf=GGUFLayout("gemma2"), **_POST_NORMS),
    "gemma3_text": Family(
        norm_offset=1.0, activation_field="hidden_activation", gguf=GGUFLayout("gemma3"), **_POST_NORMS
    ),
    "opt": Family(
        decoder="model.decoder",
        last_norm="final_layer_norm",
        learned_positions="embed_positions",
        native_decoder=True,
        attention_output="out_proj",
        attention_norm="self_attn_layer_norm",
        ffn_norm="final_layer_norm",
        ffn="",
        gate=None,
        up="fc1",
        down="fc2",
        activation_module="activation_fn",
        activation_field="activation_function",
        size_field="ffn_dim",
    ),
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model's config: its entry, or what is found in the model that transformers builds from the config.

    PartInferError says what was found that can't be computed, lists the known architectures and says where one is added.
    """
    return FAMILIES.get(config.model_type) or _found(_Content(config))


class _Content:
    """A config that equals all others of the same content."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config, self._content = config, (type(config), config.to_json_string(use_diff=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Content) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)


@lru_cache(maxsize=16)
def _found(content: _Content) -> Family:
    """What is found in the model that transformers builds from a config."""
    from transformers_patches.structure.model_structure import UnknownStructure, find_structure

    config = content.config
    try:
        found = find_structure(config)
    except UnknownStructure as reason:
        raise PartInferError(
            f"unknown architecture {config.model_type!r}: {reason}; known are {', '.join(sorted(FAMILIES))}: "
            "add a Family to FAMILIES in transformers_patches/families.py"
        ) from None
    attention = {} if found.attention is None else {"attention": found.attention}
    layout = found.layout
    ffn = {} if layout is None else {"ffn": found.ffn, "gate": layout.gate, "up": layout.up, "down": layout.down}
    return Family(
        decoder=found.decoder,
        embedding=found.embedding,
        layer_list=found.layers,
        attention_inputs=found.attention_inputs,
        attention_output=found.attention_output,
        ffn_norm=found.norm or "",
        found=found,
        **attention,
        **ffn,
    )


def gguf_family(architecture: str) -> Family:
    """The family of a GGUF file's architecture (models that share one are laid out alike).

    PartInferError lists the known architectures and says where one is added.
    """
    known = {family.gguf.architecture: family for family in reversed(FAMILIES.values()) if family.gguf}
    if architecture not in known:
        raise PartInferError(
            f"unknown GGUF architecture {architecture!r}; known are {', '.join(sorted(known))}: "
            "give a Family in transformers_patches/families.py its `gguf`"
        )
    return known[architecture]
