"""Products of few tokens by the native kernels instead of PyTorch's slow path on CPUs, and FastLinear, which uses them.

PyTorch's bfloat16 matrix-vector product goes through oneDNN at about a third of memory bandwidth; its matrix products,
for prefill, are fast and stay in use.
"""

from __future__ import annotations

import torch
from torch import nn

from transformers_patches import kernels
from transformers_patches.kernels import QuantizedTensor, Weight

FEW_TOKENS = 8  # for which the kernels read a weight only once
# Up to how many tokens the kernels beat PyTorch with float weights, and in weighted sums of rows of any type
# (docs/speed.md), and where PyTorch has no fast path for 16 bits. For quantised weights, see kernels/formats.py.
_WIN, _WIN_OVER_FLOAT32 = FEW_TOKENS, 48


def few_tokens(weight: Weight, x: torch.Tensor) -> int:
    """Up to how many tokens of x's type and device the kernels multiply faster than `kernels.project`."""
    if not x.is_cpu:
        return FEW_TOKENS
    fast = kernels.multiplies_fast(x.dtype)
    if not isinstance(weight, QuantizedTensor):
        return _WIN if fast else _WIN_OVER_FLOAT32
    native = weight.format.native
    if native is None:
        return 0
    return native.few_tokens if fast else native.few_tokens_over_float32


def multiply(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] times weight [out, in] plus bias [out]: [..., out], by the kernels if x has few tokens."""
    few = x.numel() <= few_tokens(weight, x) * weight.shape[1]
    return (kernels.linear if few else kernels.project)(x, weight, bias)


def combine(h: torch.Tensor, weight: Weight) -> torch.Tensor:
    """h [..., n] times weight [n, H]: [..., H], by the kernels if h has few tokens."""
    most = _WIN if not h.is_cpu or kernels.multiplies_fast(h.dtype) else _WIN_OVER_FLOAT32
    few = h.numel() <= most * len(weight)
    return (kernels.weighted_rows if few else kernels.combine)(h, weight)


class FastLinear(nn.Linear):
    """The same parameters and results as the nn.Linear that it replaces, up to the order of summation."""

    @classmethod
    def of(cls, linear: nn.Linear) -> FastLinear:
        """Share the weights of a linear layer (tied ones stay tied)."""
        fast = cls.__new__(cls)
        nn.Module.__init__(fast)
        fast.in_features, fast.out_features = linear.in_features, linear.out_features
        fast.weight, fast.bias = linear.weight, linear.bias
        return fast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(x, self.weight, self.bias)


def replace_linears(model: nn.Module) -> int:
    """Put FastLinears in place of all plain nn.Linear modules; returns how many."""
    plain = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, module in plain:
        model.set_submodule(name, FastLinear.of(module))
    return len(plain)
