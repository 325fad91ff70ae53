"""Which trained model is this? A short hash that is the same for every dtype and file layout of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig

from transformers_patches.families import Family, family_of


def fingerprint(config: PretrainedConfig, read: Callable[[str], torch.Tensor]) -> str:
    """Hash of a model's shape and of the norm weights of its first and last layer: 16 hex digits.

    read: returns a parameter by name, or raises KeyError. Norm weights survive quantization and conversion untouched
    (checkpoints keep them in at least bfloat16), and training moves them, so two models of the same shape differ; a
    missing bias (RMSNorm) is skipped.
    """
    family = family_of(config)
    digest = hashlib.sha256(json.dumps(_shape(config, family)).encode())
    for layer in (0, config.num_hidden_layers - 1):
        for parameter in ("weight", "bias"):
            try:
                values = read(f"{family.layers}.{layer}.{family.identifying_norm}.{parameter}")
            except KeyError:
                continue
            digest.update(values.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _shape(config: PretrainedConfig, family: Family) -> list:
    return [config.model_type, config.num_hidden_layers, config.hidden_size, family.ffn_neurons(config)]


def fingerprint_of_model(model: nn.Module) -> str:
    """`fingerprint` of a model in memory."""
    parameters = dict(model.named_parameters())
    return fingerprint(model.config, parameters.__getitem__)
