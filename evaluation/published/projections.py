"""The seven projections of every decoder layer, which is what the published baselines leave parts of out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.errors import PartInferError
from transformers_patches.families import Family, family_of
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.modules.quantized import weight_of

NAMES = ("q", "k", "v", "o", "gate", "up", "down")
FFN = ("gate", "up", "down")
SOURCE = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}  # of the same input


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer's parts."""

    layer: nn.Module
    projections: dict[str, nn.Module]  # by NAMES; each has in_features, out_features and a weight
    activation: nn.Module  # of the gate
    attention_norm: nn.Module  # before q, k and v
    ffn_norm: nn.Module  # before gate and up
    norm_offset: float  # what these add to their weights


def parts_of(loaded: LoadedModel) -> list[LayerParts]:
    """The parts of all decoder layers. Raises PartInferError for models that are built otherwise."""
    model, family = loaded.model, family_of(loaded.model.config)
    if family.found is not None or not family.gated or family.fused or len(family.attention_inputs) != 3:
        raise PartInferError(
            f"cats, teal and wina are for gated FFNs and attention with q, k, v and o of known families, not for "
            f"{model.config.model_type}: leave them out"
        )
    layers = [_layer_parts(layer, family) for layer in family.decoder_layers(model)]
    if len({id(parts.activation) for parts in layers}) < len(layers):
        raise PartInferError(
            f"the layers of {model.config.model_type} share one activation: cats can't tell them apart"
        )
    return layers


def _layer_parts(layer: nn.Module, family: Family) -> LayerParts:
    attention, ffn = layer.get_submodule(family.attention), layer.get_submodule(family.ffn)
    found = dict(zip("qkv", (getattr(attention, name) for name in family.attention_inputs), strict=True))
    found["o"] = getattr(attention, family.attention_output)
    found |= {name: getattr(ffn, getattr(family, name)) for name in FFN}
    norms = (layer.get_submodule(name) for name in (family.attention_norm, family.ffn_norm))
    return LayerParts(layer, found, getattr(ffn, family.activation_module), *norms, family.norm_offset)


def nbytes(projection: nn.Module) -> int:
    """Bytes of a projection's weight."""
    return weight_of(projection.weight).nbytes


def float_weight(projection: nn.Module) -> torch.Tensor:
    """A projection's weight in float32: [out, in]."""
    weight = weight_of(projection.weight)
    return kernels.dequantize(weight, torch.float32) if isinstance(weight, QuantizedTensor) else weight.detach().float()
