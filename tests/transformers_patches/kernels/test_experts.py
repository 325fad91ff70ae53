"""A token's experts in one call, against the formula one expert after the other."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from tests.transformers_patches.kernels.helpers import OF_BITS, error, quantized_ffn, weights
from transformers_patches import kernels
from transformers_patches.kernels import ExpertTable, Projections
from transformers_patches.structure.activations import clamped

COUNT, SIZE, HIDDEN, KEEP = 6, 43, 64, 11
SIZES = [43, 1, 12, 43, 30, 11]  # of which no more than are there are kept
CHOSEN, SHARES = torch.tensor([[4, 0, 2, 1]]), torch.tensor([[0.5, 0.125, 0.25, 0.75]])
GATED = {
    "silu": lambda gate, up: (F.silu(gate), up),
    "gelu_tanh": lambda gate, up: (F.gelu(gate, approximate="tanh"), up),
    "clamped_silu": clamped,
}


@pytest.fixture
def native(variant):
    if variant == "reference":
        pytest.skip("PyTorch has no such call: sparse/experts.py computes expert by expert")
    return variant


class Made:
    """A table of random experts, and their weights as float32."""

    def __init__(self, activation: str, bits: int | None, dtype: torch.dtype, biased: bool) -> None:
        self.activation = activation
        self.table = ExpertTable(COUNT, SIZE, HIDDEN, activation, OF_BITS[bits].native.code if bits else 0)
        self.floats, self.sizes = [], {}
        self.biases = [torch.randn(COUNT, n) if biased else torch.zeros(COUNT, n) for n in (SIZE, SIZE, HIDDEN)]
        for expert in range(COUNT):
            rows = [4 * row for row in weights(3, SIZES[expert], HIDDEN)]  # so that some are bounded
            rows = quantized_ffn(rows, bits) if bits else [row.to(dtype) for row in rows]
            own = self.biases_of(expert) if biased else [None] * 3
            self.table.set(expert, Projections.of([(row, None) for row in rows]), own[:2], own[2])
            self.floats.append([kernels.dequantize(row) if bits else row.float() for row in rows])

    def biases_of(self, expert: int) -> list[torch.Tensor]:
        gate, up, down = (bias[expert] for bias in self.biases)
        return [gate[: SIZES[expert]].contiguous(), up[: SIZES[expert]].contiguous(), down]

    def choose(self, experts: range) -> None:
        for expert in experts:
            self.sizes[expert] = torch.rand(SIZES[expert]) + 0.1
            self.table.set_size(expert, self.sizes[expert])

    def expected(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        total, computed = torch.zeros(HIDDEN), 0
        for expert, share in zip(CHOSEN[0].tolist(), SHARES[0], strict=True):
            (gate, up, down), biases = self.floats[expert], self.biases_of(expert)
            size = SIZES[expert]
            act, up = GATED[self.activation](gate @ x + biases[0], up @ x + biases[1])
            h = act * up
            if expert in self.sizes:
                scores = up.abs() * self.sizes[expert]
                h = h * (scores >= scores.topk(min(KEEP, size)).values[-1])
            total += share * (h @ down + biases[2])
            computed += min(KEEP, size) if expert in self.sizes else size
        return total, computed


@pytest.mark.parametrize("threads_used", [1, 2])
@pytest.mark.parametrize("sparse", [range(0), range(COUNT), range(1, COUNT)], ids=["none", "all", "some"])
@pytest.mark.parametrize(("activation", "biased"), [("silu", False), ("gelu_tanh", False), ("clamped_silu", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats(native, threads, dtype, activation, biased, sparse, threads_used):
    threads(threads_used)
    torch.manual_seed(1)
    made = Made(activation, None, dtype, biased)
    made.choose(sparse)
    x = torch.randn(1, HIDDEN).to(dtype)
    y, computed = made.table.run(x, CHOSEN, SHARES, KEEP)
    expected, count = made.expected(x[0].float())
    assert (y.dtype, y.shape, computed) == (dtype, x.shape, count)
    assert error(y[0].float(), expected) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("activation", ["silu", "clamped_silu"])
@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits(native, activation, bits):
    """As with any FFN, the input is rounded too. Chosen neurons may then be others, so all are computed here."""
    torch.manual_seed(1)
    made = Made(activation, bits, torch.float32, biased=True)
    x = torch.randn(1, HIDDEN)
    y, computed = made.table.run(x, CHOSEN, SHARES, 0)
    assert computed == sum(SIZES[expert] for expert in CHOSEN[0].tolist())
    assert error(y[0], made.expected(x[0])[0]) < 2e-2
    made.choose(range(COUNT))
    most, _ = made.table.run(x, CHOSEN, SHARES, SIZE)  # the best of as many as there are: the same, chosen
    assert error(most, y) < 1e-5


def test_many_experts_are_shared_out(native, threads):
    """Enough work for two threads, and for parts that whoever is done takes."""
    threads(2)
    torch.manual_seed(1)
    size, hidden = 200, 256
    table = ExpertTable(8, size, hidden, "silu", 0)
    experts = [weights(3, size, hidden) for _ in range(8)]
    for number, rows in enumerate(experts):
        table.set(number, Projections.of([(row, None) for row in rows]))
    x, chosen, shares = torch.randn(hidden), torch.randperm(8), torch.rand(8)
    expected = sum(
        share * ((F.silu(gate @ x) * (up @ x)) @ down)
        for share, (gate, up, down) in zip(shares, [experts[e] for e in chosen.tolist()], strict=True)
    )
    for _ in range(20):
        y, computed = table.run(x, chosen, shares, 0)
        assert computed == 8 * size
        assert error(y, expected) < 1e-5


def test_rows_may_move_and_sizes_may_go(native):
    torch.manual_seed(1)
    made = Made("silu", None, torch.float32, biased=False)
    made.choose(range(COUNT))
    x = torch.randn(1, HIDDEN)
    for expert in range(COUNT):
        made.table.set_size(expert, None)
        made.floats[expert] = weights(3, SIZES[expert], HIDDEN)
        made.table.set(expert, Projections.of([(row, None) for row in made.floats[expert]]))
    made.sizes = {}
    y, computed = made.table.run(x, CHOSEN, SHARES, KEEP)
    assert computed == sum(SIZES[expert] for expert in CHOSEN[0].tolist())
    assert error(y[0], made.expected(x[0])[0]) < 1e-5


def test_what_does_not_fit_is_refused(native):
    made = Made("silu", None, torch.float32, biased=False)
    x = torch.randn(1, HIDDEN)
    empty = ExpertTable(COUNT, SIZE, HIDDEN, "silu", 0)
    for table, x_, chosen, shares, keep, said in (
        (made.table, x, torch.tensor([[6]]), torch.ones(1), 0, "there is no expert 6 of 6"),
        (made.table, x, torch.tensor([[-1]]), torch.ones(1), 0, "there is no expert -1 of 6"),
        (made.table, x[:, 1:], CHOSEN, SHARES, 0, "x must be one token of 64 values"),
        (made.table, x, CHOSEN.int(), SHARES, 0, "expected the numbers of experts, int64"),
        (made.table, x, CHOSEN, SHARES[:, 1:], 0, "as many shares"),
        (made.table, x, CHOSEN, SHARES, -1, "keep can't be -1"),
        (empty, x, CHOSEN, SHARES, 0, "expert 4 has no rows"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=said):
            table.run(x_, chosen, shares, keep)
    with pytest.raises((ValueError, RuntimeError), match="gate must be"):
        made.table.set(0, Projections.of([(row, None) for row in weights(3, SIZE, HIDDEN + 32)]))
    with pytest.raises((ValueError, RuntimeError), match="an expert has 1 to 43 neurons"):
        made.table.set(0, Projections.of([(row, None) for row in weights(3, SIZE + 1, HIDDEN)]))
    with pytest.raises((ValueError, RuntimeError), match="size must be contiguous float32"):
        made.table.set_size(0, torch.rand(SIZE + 1))
