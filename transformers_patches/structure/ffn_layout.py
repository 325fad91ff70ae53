"""FFNLayout: how a module is laid out that computes the feed-forward network of a decoder layer.

A gated FFN is down(act(gate(x)) * up(x)), a plain one down(act(up(x))). Which of its linear layers is which is found by
their shapes, and by trying: the module is run with small random weights, and has to compute what the layout says.
H hidden, N neurons.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN

from transformers_patches.structure.activations import NAMES, Scaled, cutoff, is_activation, name_of, new_like

SMALL_HIDDEN, SMALL_SIZE = 12, 20  # of the module that is tried; other than those of any model
TOLERANCE = 1e-5


@dataclass(frozen=True)
class FFNLayout:
    """The FFN of a layer.

    size: N.
    up, gate, down: names of the linear layers; gate is None in a plain FFN.
    fused: the layer `up` holds the rows of gate, too, and has 2 N of them; `gate` is then the same name.
    gate_first: of a fused one, whether the rows of gate come first.
    activation: transformers' name, or that of the child that is the activation, with a dot before it.
    inside, outside: what the activation's input and the FFN's output are multiplied with.
    cut: 0, or the share of neurons that the FFN itself leaves out (`structure/activations.py`).
    """

    size: int
    up: str
    gate: str | None
    down: str
    fused: bool = False
    gate_first: bool = True
    activation: str = "silu"
    inside: float = 1.0
    outside: float = 1.0
    cut: float = 0.0

    def activation_of(self, module: nn.Module) -> str | nn.Module:
        """The activation of a module of this layout: transformers' name, or a module where it has no name there."""
        own = getattr(module, self.activation[1:]) if self.activation.startswith(".") else None
        name = self.activation if own is None else name_of(own)
        if (self.inside, self.outside) != (1.0, 1.0):
            return Scaled(ACT2FN[name] if own is None else own, self.inside, self.outside)
        return name or own


class NotAnFFN(Exception):
    """Says what a module has that no layout has."""


def layout_of(module: nn.Module, hidden_size: int) -> FFNLayout:
    """The layout of a module, whose weights may be without memory; NotAnFFN, with the reason, if it has none."""
    _check_parts(module)
    for layout in _candidates(module, hidden_size):
        if _computes(module, layout):
            return layout
    raise NotAnFFN("what it computes is no FFN of a known kind")


def takes_hidden_states_alone(module: nn.Module) -> bool:
    """Whether forward has a single parameter, as FFNs have it and attentions do not."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"]
    return len(named) == 1


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """The children of a module that are linear layers."""
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}


def _check_parts(module: nn.Module) -> None:
    """Everything in it has to be a linear layer, an activation, or dropout."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | nn.Dropout) or is_activation(child):
            continue
        raise NotAnFFN(f"it has {name} ({type(child).__name__})")
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise NotAnFFN(f"it has {own[0]}, a parameter of its own")


def _candidates(module: nn.Module, hidden_size: int) -> Iterator[FFNLayout]:
    """Every layout that the shapes of the linear layers allow."""
    inside, outside = (float(getattr(module, name, 1.0)) for name in ("gate_multiplier", "down_multiplier"))
    cut = float(getattr(module, "activation_sparsity", 0.0))
    for shape in _shapes(linears_of(module), hidden_size):
        for activation in _activations(module):
            yield FFNLayout(**shape, activation=activation, inside=inside, outside=outside, cut=cut)


def _shapes(linears: dict[str, nn.Linear], hidden_size: int) -> Iterator[dict]:
    for down, last in linears.items():
        inputs = {name: other for name, other in linears.items() if name != down}
        size = last.in_features
        if last.out_features != hidden_size or any(other.in_features != hidden_size for other in inputs.values()):
            continue
        rows = [other.out_features for other in inputs.values()]
        names = list(inputs)
        if rows == [size, size]:
            for gate, up in (names, names[::-1]):
                yield {"size": size, "gate": gate, "up": up, "down": down}
        elif rows == [2 * size]:
            for first in (True, False):
                yield {"size": size, "gate": names[0], "up": names[0], "down": down, "fused": True, "gate_first": first}
        elif rows == [size]:
            yield {"size": size, "gate": None, "up": names[0], "down": down}


def _activations(module: nn.Module) -> list[str]:
    """The activation that the module has, or else all that it may call by itself."""
    own = [f".{name}" for name, child in module.named_children() if _is_own_activation(child)]
    return own[:1] or list(NAMES)


def _is_own_activation(child: nn.Module) -> bool:
    return not isinstance(child, nn.Linear | nn.Dropout) and is_activation(child)


@torch.no_grad()
def _computes(module: nn.Module, layout: FFNLayout) -> bool:
    """Whether a small copy of the module, with random weights, computes what the layout says."""
    generator = torch.Generator().manual_seed(0)
    small = _small_copy(module, layout, generator)
    x = torch.randn(2, 3, SMALL_HIDDEN, generator=generator)
    try:
        found = small(x)
    except Exception:  # it needs something that the layout does not have
        return False
    if not isinstance(found, torch.Tensor) or found.shape != x.shape:
        return False
    expected = _by_layout(small, layout, x)
    return bool((found - expected).abs().max() <= TOLERANCE * (1 + expected.abs().max()))


def _small_copy(module: nn.Module, layout: FFNLayout, generator: torch.Generator) -> nn.Module:
    small = copy.copy(module)  # its forward, and its numbers
    small._modules = dict(module._modules)
    rows = 2 * SMALL_SIZE if layout.fused else SMALL_SIZE
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            out, width = (SMALL_HIDDEN, SMALL_SIZE) if name == layout.down else (rows, SMALL_HIDDEN)
            new = nn.Linear(width, out, bias=child.bias is not None)
            for parameter in new.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
            small._modules[name] = new
        elif _is_own_activation(child):
            small._modules[name] = new_like(child)
    return small.eval()


def _by_layout(module: nn.Module, layout: FFNLayout, x: torch.Tensor) -> torch.Tensor:
    act: str | Callable = layout.activation_of(module)
    act = ACT2FN[act] if isinstance(act, str) else act
    up, down = getattr(module, layout.up), getattr(module, layout.down)
    if layout.gate is None:
        return down(act(up(x)))
    if layout.fused:
        gate, up = up(x).chunk(2, dim=-1) if layout.gate_first else up(x).chunk(2, dim=-1)[::-1]
        return down(act(gate) * up)
    gate = getattr(module, layout.gate)(x)
    if layout.cut:
        gate = nn.functional.relu(gate - cutoff(gate, layout.cut))
    return down(act(gate) * up(x))
