"""The activation of a feed-forward network, as a module has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.activations import ACT2FN

NAMES = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2")  # those that are compared with by their type
CLAMPED_SILU = "clamped_silu"  # gpt-oss's; transformers has no name for it
CLAMP, ALPHA = 7.0, 1.702  # its numbers; csrc/types.h and csrc/activation.h have the same


def clamped(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of gpt-oss's activations, which bounds gate·x above and up·x on both sides."""
    gate = gate.clamp(max=CLAMP)
    return gate * torch.sigmoid(gate * ALPHA), up.clamp(-CLAMP, CLAMP) + 1


class Scaled(nn.Module):
    """act(x * inside) * outside, as Falcon-H1 has it: the second factor is that of the FFN's output."""

    def __init__(self, activation: nn.Module, inside: float, outside: float) -> None:
        super().__init__()
        self.activation, self.inside, self.outside = activation, inside, outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(x * self.inside) * self.outside


def cutoff(gate: torch.Tensor, share: float) -> torch.Tensor:
    """Below which Gemma 3n leaves neurons out: mean + z std over gate·x [..., N] of all neurons, [..., 1].

    z is the normal distribution's quantile of the share. In gate's type, as transformers has it.
    """
    z = torch.distributions.Normal(0, 1).icdf(torch.tensor(share, dtype=torch.float32, device=gate.device))
    mean, deviation = gate.mean(-1, keepdim=True), gate.std(-1, keepdim=True, unbiased=False)
    return mean + deviation * z.to(gate.dtype)


def is_activation(module: nn.Module) -> bool:
    """Whether a module may be an activation: it has no children, and no parameters but single numbers."""
    return not list(module.children()) and all(p.numel() == 1 for p in module.parameters(recurse=False))


def name_of(activation: nn.Module) -> str | None:
    """The name in ACT2FN of an activation without parameters, if it is one of NAMES."""
    known = (name for name in NAMES if type(ACT2FN[name]) is type(activation))
    return next((name for name in known if vars_of(ACT2FN[name]) == vars_of(activation)), None)


def vars_of(module: nn.Module) -> dict[str, object]:
    """What sets an activation apart from others of its class."""
    values = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return {name: (v.func, v.args, v.keywords) if isinstance(v, partial) else v for name, v in values.items()}


def new_like(activation: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same activation in float32 with memory of its own, for a module whose numbers may be without memory."""
    name = name_of(activation)
    return ACT2FN[name] if name else type(activation)().float()
