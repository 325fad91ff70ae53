"""The activation of a feed-forward network, as a module has it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

NAMES = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2")  # those that are compared with by their type


class Scaled(nn.Module):
    """act(x * inside) * outside, as Falcon-H1 has it: the second factor is that of the FFN's output."""

    def __init__(self, activation: nn.Module, inside: float, outside: float) -> None:
        super().__init__()
        self.activation, self.inside, self.outside = activation, inside, outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(x * self.inside) * self.outside


def is_activation(module: nn.Module) -> bool:
    """Whether a module may be an activation: it has no children, and no parameters but single numbers."""
    return not list(module.children()) and all(p.numel() == 1 for p in module.parameters(recurse=False))


def name_of(activation: nn.Module) -> str | None:
    """The name in ACT2FN of an activation without parameters, if it is one of NAMES."""
    known = (name for name in NAMES if type(ACT2FN[name]) is type(activation))
    return next((name for name in known if vars_of(ACT2FN[name]) == vars_of(activation)), None)


def vars_of(module: nn.Module) -> dict[str, object]:
    """What sets an activation apart from others of its class."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}


def new_like(activation: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same activation in float32 with memory of its own, for a module whose numbers may be without memory."""
    name = name_of(activation)
    return ACT2FN[name] if name else type(activation)().float()
