"""GradientLinear: a linear layer with gradients of its input, whose products are fast whatever the weight's type."""

from __future__ import annotations

import torch
from torch import nn

from transformers_patches.kernels import multiplies_fast


class GradientLinear(nn.Module):
    """Stands in for a linear layer while gradients are taken: x [..., in] -> [..., out]. No gradients of weights.

    Where the processor multiplies 16 bits slowly, products are of float32 copies, one weight at a time: neither copy is
    kept for the way back, so that the model takes no more memory.
    """

    def __init__(self, linear: nn.Module) -> None:
        """linear: has a weight [out, in] and a bias [out] or None, which are shared."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(*_multiplied(x, weight), None if bias is None else _multiplied(bias)[0]).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        wide, floats = _multiplied(gradient, weight)
        return (wide @ floats).to(gradient.dtype), None, None


def _multiplied(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In the type in which they are multiplied."""
    first = tensors[0]
    slow = first.device.type == "cpu" and not multiplies_fast(first.dtype)
    return tuple(tensor.float() for tensor in tensors) if slow else tensors
