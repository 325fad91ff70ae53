"""ModelStructure: where an architecture has its decoder layers, their FFNs and attentions, found in an empty model.

Only what PartInfer reads, replaces or watches is looked for. Everything else (attention, norms, residuals, caches) is
computed by transformers' own modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from transformers_patches.errors import PartInferError
from transformers_patches.structure.empty_model import built
from transformers_patches.structure.experts_layout import ExpertsLayout, experts_layout_of, holds_experts
from transformers_patches.structure.ffn_layout import (
    FFNLayout,
    NotAnFFN,
    layout_of,
    linears_of,
    takes_hidden_states_alone,
)

QUERIES = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("query_key_value",))
OUTPUTS = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True)
class ModelStructure:
    """Paths are of modules, relative to what the comment names.

    All FFNs that can be computed by neurons have one place and one layout, which is None if there are none. `whole` has
    the other layers, and why they can't.
    """

    decoder: str  # in the model
    layers: str  # in the decoder
    embedding: str  # in the decoder
    layout: FFNLayout | None
    ffn: str  # in the layer
    whole: dict[int, str]
    attention: str | None  # in a layer that has one: what has the projections of QUERIES; None: nothing of the kind
    attention_inputs: tuple[str, ...] = ()
    attention_output: str = ""
    norm: str | None = None  # in the layer: one with weights
    renamings: list[WeightRenaming] = field(default_factory=list)  # from names in files to those in the model
    stacked: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # by the name of a tensor with all experts' weights: what those of one expert are called in files
    experts: str = ""  # in a layer that has some: what holds the experts
    mixtures: tuple[int, ...] = ()  # layers with experts
    cuts: dict[int, tuple[str, FFNLayout]] = field(
        default_factory=dict
    )  # layers that cut their activations: place, layout
    experts_layout: ExpertsLayout | None = None  # None: there are none, or laid out otherwise
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of all weights, by name in the model


class UnknownStructure(Exception):
    """Says what was found in place of decoder layers with FFNs."""


def find_structure(config: PretrainedConfig) -> ModelStructure:
    """The structure of the model that transformers builds from a config; UnknownStructure says what is in the way."""
    model = _empty_model(config)
    hidden_size = getattr(config, "hidden_size", 0)
    decoder, layers_name, layers = _decoder_of(model)
    found = [_ffn_of(layer, hidden_size) for layer in layers]
    kinds = Counter(one for one in found if not isinstance(one, str) and not one[1].cut)
    place, layout = kinds.most_common(1)[0][0] if kinds else ("", None)
    whole = {number: _why_whole(one, layout) for number, one in enumerate(found) if one != (place, layout)}
    attention, inputs, output = _attention_of(layers)
    experts, experts_layout = _experts_of(layers, hidden_size)
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    return ModelStructure(
        decoder=_path(model, decoder),
        layers=layers_name,
        embedding=_path(decoder, model.get_input_embeddings()),
        layout=layout,
        ffn=place,
        whole=whole,
        attention=attention,
        attention_inputs=inputs,
        attention_output=output,
        norm=_norm_of(layers[0], hidden_size),
        renamings=[one for one in conversions if isinstance(one, WeightRenaming)],
        stacked=_stacked(conversions),
        experts=experts,
        mixtures=tuple(n for n, layer in enumerate(layers) if any(map(holds_experts, layer.modules()))),
        experts_layout=experts_layout,
        shapes={name: tuple(values.shape) for name, values in model.state_dict().items()},
        cuts={number: one for number, one in enumerate(found) if not isinstance(one, str) and one[1].cut},
    )


def _empty_model(config: PretrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # some models compute with their buffers when they are built
        try:
            return built(lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        except Exception as error:  # whatever the values lead to
            raise cant_be_built(config, error) from None


def cant_be_built(config: PretrainedConfig, error: Exception) -> PartInferError:
    """What to say where transformers can't build a model from a config: unknown activations, sizes that don't divide, …"""
    said = " ".join(str(error).split(". ")[0].split())[:300]
    return PartInferError(
        f"config.json can't be used, no {config.model_type} model can be built from it ({type(error).__name__}: "
        f"{said or type(error).__name__}): fetch the model again"
    )


def _decoder_of(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module with the list of decoder layers, the list's name there, and the list."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers and "layer" in name:
                return module, name, child
    raise UnknownStructure("it has no list of decoder layers")


def _path(root: nn.Module, module: nn.Module) -> str:
    return next(name for name, child in root.named_modules() if child is module)


def _ffn_of(layer: nn.Module, hidden_size: int) -> tuple[str, FFNLayout] | str:
    """Place and layout of a layer's FFN, the largest if there are several; or why it can't be computed by neurons.

    UnknownStructure if there is nothing that could be one.
    """
    reasons, found = [], []
    for place, module in _feed_forward_modules(layer):
        try:
            found.append((place, layout_of(module, hidden_size)))
        except NotAnFFN as reason:
            reasons.append(f"{place}: {reason}")
    experts = [place for place, module in layer.named_modules() if holds_experts(module)]
    if experts:
        return f"it has a mixture of experts ({experts[0]})"
    if found:
        return max(found, key=lambda one: one[1].size)
    if not reasons:
        raise UnknownStructure("no module of its layers computes from the hidden states alone, as an FFN does")
    return reasons[0]


def _feed_forward_modules(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that may be the layer's FFN: with two or three linear layers, called with the hidden states alone."""
    for place, module in layer.named_modules():
        if place and linears_of(module) and takes_hidden_states_alone(module):
            yield place, module


def _experts_of(layers: nn.ModuleList, hidden_size: int) -> tuple[str, ExpertsLayout | None]:
    """Place and layout of the experts, where all layers that have some have them alike."""
    found = {
        (place, experts_layout_of(module, hidden_size))
        for layer in layers
        for place, module in layer.named_modules()
        if holds_experts(module)
    }
    return found.pop() if len(found) == 1 else ("", None)


def _stacked(conversions: list) -> dict[str, tuple[str, ...]]:
    """What transformers puts together from one tensor per expert: the name after the layer's -> those of one expert.

    The names of an expert have a * for its number. Their rows come one after the other.
    """
    stacked = {}
    for one in conversions:
        if not isinstance(one, WeightConverter):
            continue
        kinds = [(type(operation), operation.dim) for operation in one.operations if hasattr(operation, "dim")]
        if kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]) and len(kinds) == len(
            one.operations
        ):
            names = tuple(name.strip(".") for name in one._original_source_patterns)
            stacked[one._original_target_patterns[0].strip(".")] = names
    return stacked


def _why_whole(found: tuple[str, FFNLayout] | str, usual: FFNLayout | None) -> str:
    if isinstance(found, str):
        return found
    place, layout = found
    if layout.cut:
        return f"{place} itself leaves out {layout.cut:.0%} of its neurons"
    if layout.size != usual.size:
        return f"{place} has {layout.size} neurons, not {usual.size} as in most layers"
    return f"{place} is laid out differently from most layers"


def _attention_of(layers: nn.ModuleList) -> tuple[str | None, tuple[str, ...], str]:
    """Place and projections of the first attention that has names known here."""
    for layer in layers:
        for place, module in layer.named_children():
            linears = linears_of(module)
            for inputs in QUERIES:
                output = next((name for name in OUTPUTS if name in linears), None)
                if output and all(name in linears for name in inputs):
                    return place, inputs, output
    return None, (), ""


def _norm_of(layer: nn.Module, hidden_size: int) -> str | None:
    """A child of the layer that is a norm with weights."""
    for name, child in layer.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.shape == (hidden_size,):
            return name
    return None
