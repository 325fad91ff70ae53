"""ExpertsLayout: how a module is laid out that holds the experts of a mixture, and computes those that a router chose.

Expert e is down_e(act(gate_e x) * up_e x), with gate and up in one tensor [E, 2 N, H] and down in one [E, H, N]. As with
ffn_layout.py, that is not believed but tried: with small random weights. E experts, N neurons of each, H hidden.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN

from transformers_patches.structure.activations import NAMES, is_activation, name_of, new_like
from transformers_patches.structure.ffn_layout import TOLERANCE

SMALL_COUNT, SMALL_HIDDEN, SMALL_SIZE = 3, 16, 24  # of the module that is tried


@dataclass(frozen=True)
class ExpertsLayout:
    """The experts of one layer.

    count, size, hidden: E, N, H.
    gate_up, down: names of the tensors; of the first, the rows of gate come first.
    activation: transformers' name, as the native kernels need it.
    """

    count: int
    size: int
    hidden: int
    gate_up: str
    down: str
    activation: str


def holds_experts(module: nn.Module) -> bool:
    """Whether a module may be the experts of a layer: it has tensors of three dimensions."""
    matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    return bool(matrices) and not isinstance(module, nn.Conv1d)


def experts_layout_of(module: nn.Module, hidden_size: int) -> ExpertsLayout | None:
    """The layout of a module, whose weights may be without memory; None if it has another one."""
    tensors = dict(module.named_parameters(recurse=False))
    children = dict(module.named_children())
    if len(tensors) != 2 or not all(is_activation(child) for child in children.values()):
        return None
    (gate_up, first), (down, last) = tensors.items()
    if first.ndim != 3 or first.shape[2] != hidden_size or last.shape != (len(first), hidden_size, first.shape[1] // 2):
        return None
    own = next((name_of(child) for child in children.values()), None)
    for activation in [own] if own else NAMES:
        layout = ExpertsLayout(len(first), last.shape[2], hidden_size, gate_up, down, activation)
        if _computes(module, layout):
            return layout
    return None


@torch.no_grad()
def _computes(module: nn.Module, layout: ExpertsLayout) -> bool:
    """Whether a small copy of the module, with random weights, computes what the layout says."""
    generator = torch.Generator().manual_seed(0)
    small = copy.copy(module)  # its forward, and its numbers
    small._modules = {name: new_like(child) for name, child in module._modules.items()}
    small.num_experts = SMALL_COUNT
    gate_up = torch.randn(SMALL_COUNT, 2 * SMALL_SIZE, SMALL_HIDDEN, generator=generator) * 0.5
    down = torch.randn(SMALL_COUNT, SMALL_HIDDEN, SMALL_SIZE, generator=generator) * 0.5
    small._parameters = {layout.gate_up: nn.Parameter(gate_up), layout.down: nn.Parameter(down)}
    x = torch.randn(4, SMALL_HIDDEN, generator=generator)
    index = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    weights = torch.rand(index.shape, generator=generator)
    try:
        found = small(x, index, weights)
    except Exception:  # it needs something that the layout does not have
        return False
    expected, act = torch.zeros_like(x), ACT2FN[layout.activation]
    for token in range(len(x)):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected[token] += weight * (down[expert] @ (act(gate) * up))
    same = isinstance(found, torch.Tensor) and found.shape == x.shape
    return same and bool((found - expected).abs().max() <= TOLERANCE * (1 + expected.abs().max()))
