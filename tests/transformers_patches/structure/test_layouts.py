"""Layouts are found by trying, whatever things are called; what has another form is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.activations import ACT2FN

from transformers_patches.structure.activations import NAMES, name_of
from transformers_patches.structure.ffn_layout import FFNLayout, NotAnFFN, layout_of

H, N = 16, 40


class Made(nn.Module):
    """An FFN of three projections."""

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(H, N), nn.Linear(H, N), nn.Linear(N, H)
        self.act = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.act(self.b(x)) * self.a(x))


class Fused(nn.Module):
    """One whose first projection has up's rows, then gate's."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(H, 2 * N, bias=False), nn.Linear(N, H, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * up)


class Interleaved(Fused):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.both(x)
        return self.down(F.silu(both[..., ::2]) * both[..., 1::2])


class Clamped(Made):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c((self.act(self.b(x)) * self.a(x)).clamp(-1, 1))


class Normed(Made):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.norm(self.act(self.b(x)) * self.a(x)))


class OwnSparsity(Made):
    """As Gemma 3n cuts, but by another rule."""

    activation_sparsity = 0.95

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.b(x)
        return self.c(self.act(F.relu(gate - gate.amax(-1, keepdim=True) / 2)) * self.a(x))


def test_gate_is_what_the_activation_is_applied_to():
    with torch.device("meta"):
        module = Made()
    assert layout_of(module, H) == FFNLayout(N, up="a", gate="b", down="c", activation=".act")


def test_a_fused_projection_may_begin_with_up():
    expected = FFNLayout(N, up="both", gate="both", down="down", fused=True, gate_first=False, activation="gelu")
    assert layout_of(Fused(), H) == expected


@pytest.mark.parametrize("kind", [Interleaved, Clamped, OwnSparsity])
def test_another_formula_is_no_ffn(kind):
    with pytest.raises(NotAnFFN, match="what it computes is no FFN of a known kind"):
        layout_of(kind(), H)


def test_a_norm_inside_is_said():
    with pytest.raises(NotAnFFN, match=r"it has norm \(RMSNorm\)"):
        layout_of(Normed(), H)


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_known_by_what_they_are(name):
    assert layout_of(Made(name), H).activation_of(Made(name)) in (name, "gelu_pytorch_tanh")
    assert ACT2FN[name_of(ACT2FN[name])](torch.tensor(0.3)) == ACT2FN[name](torch.tensor(0.3))
