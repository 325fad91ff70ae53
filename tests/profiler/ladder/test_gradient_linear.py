"""GradientLinear: products and gradients as those of a plain linear layer, in every type and on every processor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from profiler.ladder import gradient_linear
from profiler.ladder.gradient_linear import GradientLinear


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_product_and_gradient(monkeypatch, fast: bool, bias: bool, dtype: torch.dtype, bound: float):
    monkeypatch.setattr(gradient_linear, "multiplies_fast", lambda asked: fast or asked == torch.float32)
    generator = torch.Generator().manual_seed(7)
    linear = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    exact = torch.randn(3, 5, 24, generator=generator).requires_grad_(True)
    pull = torch.randn(3, 5, 40, generator=generator)
    own = exact.detach().to(dtype).requires_grad_(True)
    linear(exact).backward(pull)
    result = GradientLinear(linear.to(dtype))(own)
    result.backward(pull.to(dtype))
    assert result.dtype == own.grad.dtype == dtype
    assert torch.allclose(own.grad.float(), exact.grad, atol=bound * float(exact.grad.abs().max()))
    expected = linear.float()(exact.detach())
    assert torch.allclose(result.float(), expected, atol=bound * float(expected.abs().max()))
    assert linear.weight.grad is None
