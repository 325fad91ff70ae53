"""ExpertsLayout: how a module is laid out that holds the experts of a mixture, and computes those that a router chose.

Expert e is down_e(act(gate_e x) * up_e x), with gate and up in one tensor [E, 2 N, H] and down in one [E, H, N]. gpt-oss
has [E, H, 2 N], in which columns of gate and up take turns, [E, N, H], biases, and bounds on what is multiplied. As with
ffn_layout.py, that is not believed but tried: with small random weights. E experts, N neurons of each, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN

from transformers_patches.structure.activations import CLAMPED_SILU, NAMES, clamped, is_activation, name_of, new_like
from transformers_patches.structure.ffn_layout import TOLERANCE

SMALL_COUNT, SMALL_HIDDEN, SMALL_SIZE = 3, 16, 24  # of the module that is tried


@dataclass(frozen=True)
class ExpertsLayout:
    """The experts of one layer.

    count, size, hidden: E, N, H.
    gate_up, down: names of the tensors; of the first, the rows of gate come first.
    activation: transformers' name, as the native kernels need it; CLAMPED_SILU, if they are laid out as gpt-oss has them.
    gate_up_bias, down_bias: names of the biases; None if there are none.
    """

    count: int
    size: int
    hidden: int
    gate_up: str
    down: str
    activation: str
    gate_up_bias: str | None = None
    down_bias: str | None = None

    @property
    def interleaved(self) -> bool:
        """Whether neurons are columns of the first tensor, gate and up taking turns, and rows of the second."""
        return self.activation == CLAMPED_SILU


def holds_experts(module: nn.Module) -> bool:
    """Whether a module may be the experts of a layer: it has tensors of three dimensions."""
    matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    return bool(matrices) and not isinstance(module, nn.Conv1d)


def experts_layout_of(module: nn.Module, hidden_size: int) -> ExpertsLayout | None:
    """The layout of a module, whose weights may be without memory; None if it has another one."""
    if not all(is_activation(child) for child in module.children()):
        return None
    return next((layout for layout in _candidates(module, hidden_size) if _computes(module, layout)), None)


def _candidates(module: nn.Module, hidden: int) -> Iterator[ExpertsLayout]:
    """Every layout that the shapes allow."""
    tensors = dict(module.named_parameters(recurse=False))
    names, shapes = list(tensors), [tuple(tensor.shape) for tensor in tensors.values()]
    if len(names) == 2 and len(shapes[0]) == 3:
        (count, rows, _), size = shapes[0], shapes[0][1] // 2
        if shapes == [(count, rows, hidden), (count, hidden, size)]:
            own = next((name_of(child) for child in module.children()), None)
            for activation in [own] if own else NAMES:
                yield ExpertsLayout(count, size, hidden, *names, activation)
    if len(names) == 4 and len(shapes[0]) == 3:
        (count, _, columns), size = shapes[0], shapes[0][2] // 2
        if shapes == [(count, hidden, columns), (count, columns), (count, size, hidden), (count, hidden)]:
            yield ExpertsLayout(count, size, hidden, names[0], names[2], CLAMPED_SILU, names[1], names[3])


@torch.no_grad()
def _computes(module: nn.Module, layout: ExpertsLayout) -> bool:
    """Whether a small copy of the module, with random weights, computes what the layout says."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    small = copy.copy(module)  # its forward, and its numbers
    small._modules = {name: new_like(child) for name, child in module._modules.items()}
    small.num_experts = SMALL_COUNT
    gate_up, down = some(SMALL_COUNT, 2 * SMALL_SIZE, SMALL_HIDDEN), some(SMALL_COUNT, SMALL_HIDDEN, SMALL_SIZE)
    values = {layout.gate_up: gate_up, layout.down: down}
    if layout.interleaved:
        gate_up, down = 12 * gate_up, down.transpose(1, 2).contiguous()  # so that the bounds are reached
        values = {layout.gate_up: gate_up.transpose(1, 2).contiguous(), layout.gate_up_bias: some(*gate_up.shape[:2])}
        values |= {layout.down: down, layout.down_bias: some(SMALL_COUNT, SMALL_HIDDEN)}
    small._parameters = {name: nn.Parameter(value) for name, value in values.items()}
    x = some(4, SMALL_HIDDEN) * 2
    index = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    weights = torch.rand(index.shape, generator=generator)
    try:
        found = small(x, index, weights)
    except Exception:  # it needs something that the layout does not have
        return False
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            expected[token] += weight * _by_layout(layout, {name: v[expert] for name, v in values.items()}, x[token])
    same = isinstance(found, torch.Tensor) and found.shape == x.shape
    return same and bool((found - expected).abs().max() <= TOLERANCE * (1 + expected.abs().max()))


def _by_layout(layout: ExpertsLayout, expert: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One expert's output for one token x [H]."""
    if layout.interleaved:
        both = x @ expert[layout.gate_up] + expert[layout.gate_up_bias]
        gate, up = clamped(both[::2], both[1::2])
        return (gate * up) @ expert[layout.down] + expert[layout.down_bias]
    gate, up = (expert[layout.gate_up] @ x).chunk(2)
    return expert[layout.down] @ (ACT2FN[layout.activation](gate) * up)
