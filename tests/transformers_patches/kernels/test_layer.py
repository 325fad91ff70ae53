"""The operations of a decoder layer on one token, against float64 in PyTorch."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import AttentionLayer, Projections, layer

from .helpers import TOLERANCE, error

DTYPES = list(TOLERANCE)
# query heads, key-value heads, head size, hidden size, tokens in the cache, window
SIZES = [
    (9, 3, 64, 576, 40, 0),
    (4, 2, 8, 32, 0, 0),
    (12, 1, 20, 52, 7, 5),
    (6, 6, 34, 70, 300, 0),
    (8, 4, 128, 256, 129, 64),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def linears(*shapes: tuple[int, int], dtype: torch.dtype, bias: bool) -> list:
    weights = [(torch.randn(shape) * shape[1] ** -0.5).to(dtype) for shape in shapes]
    return [(weight, torch.randn(len(weight)).to(dtype) if bias else None) for weight in weights]


def doubled(linears: list) -> Projections:
    return Projections.of([(weight.double(), None if bias is None else bias.double()) for weight, bias in linears])


class Step:
    """The arguments of an attention_step."""

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, *, bias: bool = False, head_norms: bool = False):
        heads, kv_heads, head_dim, hidden, self.length, self.window = size
        queries, keys = heads * head_dim, kv_heads * head_dim
        shapes = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
        self.linears = linears(*shapes, dtype=dtype, bias=bias)
        self.x, self.delta = torch.randn(2, 1, 1, hidden).to(dtype)
        self.norm, self.next_norm = (1 + torch.randn(2, hidden) / 10).to(dtype)
        self.head_norms = (1 + torch.randn(2, head_dim) / 10).to(dtype) if head_norms else (None, None)
        angles = torch.rand(head_dim // 2).repeat(2) * 6
        self.cosine, self.sine = angles.cos().to(dtype), angles.sin().to(dtype)
        self.cache = torch.randn(2, 1, kv_heads, self.length + 3, head_dim).to(dtype)

    def run(self, step, projections, cast) -> tuple[torch.Tensor, ...]:
        keys, values = (cast(part).clone() for part in self.cache)
        norms = [None if norm is None else cast(norm) for norm in self.head_norms]
        x, delta, norm, next_norm = (cast(v) for v in (self.x, self.delta, self.norm, self.next_norm))
        settings = AttentionLayer(norm, next_norm, projections, 1e-5, keys.shape[-1] ** -0.5, *norms, self.window)
        sums = step(x, delta, settings, cast(self.cosine), cast(self.sine), keys, values, self.length)
        return *sums, keys[:, :, : self.length + 1], values[:, :, : self.length + 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention_step(variant, dtype, size):
    for options in ({}, {"bias": True}, {"head_norms": True}):
        step = Step(size, dtype, **options)
        result = step.run(kernels.attention_step, Projections.of(step.linears), lambda part: part)
        expected = step.run(layer.attention_step, doubled(step.linears), torch.Tensor.double)
        for name, ours, theirs in zip(("sum", "next", "keys", "values"), result, expected, strict=True):
            assert ours.dtype == dtype
            assert error(ours, theirs) < TOLERANCE[dtype], f"{name} {options}"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_projections(variant, bits):
    step = Step((4, 2, 32, 64, 20, 0), torch.bfloat16)
    packed = [(kernels.quantize(weight, bits), bias) for weight, bias in step.linears]
    plain = [(kernels.dequantize(weight).double(), bias) for weight, bias in packed]
    result = step.run(kernels.attention_step, Projections.of(packed), lambda part: part)
    expected = step.run(layer.attention_step, Projections.of(plain), torch.Tensor.double)
    for ours, theirs in zip(result, expected, strict=True):
        assert error(ours, theirs) < 2e-2  # the inputs are rounded to 8 bits, too


@pytest.mark.parametrize("several", [1, 2, 3])
def test_any_number_of_threads(threads, several):
    threads(several)
    step = Step((32, 8, 64, 512, 700, 0), torch.float32)
    result = step.run(kernels.attention_step, Projections.of(step.linears), lambda part: part)
    expected = step.run(layer.attention_step, doubled(step.linears), torch.Tensor.double)
    assert all(error(ours, theirs) < 1e-5 for ours, theirs in zip(result, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden, neurons", [(32, 80), (576, 1536), (7, 13)])
def test_dense_ffn(variant, dtype, hidden, neurons):
    x = torch.randn(1, 1, hidden).to(dtype)
    for bias in (False, True):
        ours = linears((neurons, hidden), (neurons, hidden), (hidden, neurons), dtype=dtype, bias=bias)
        for activation in ("silu", "gelu", "gelu_tanh"):
            result = kernels.dense_ffn(x, Projections.of(ours), activation)
            expected = layer.dense_ffn(x.double(), doubled(ours), activation)
            assert error(result, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 31, 576])
def test_add_norm(variant, dtype, hidden):
    x, delta, weight = torch.randn(3, 1, 1, hidden).to(dtype)
    expected = layer.rms_norm(x.double() + delta.double(), weight.flatten().double(), 1e-6)
    assert error(kernels.add_norm(x, delta, weight.flatten(), 1e-6), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, neurons, k", [(1, 7, 3), (40, 530, 60), (9, 64, 64), (5, 100, 1)])
def test_core_counts(variant, dtype, tokens, neurons, k):
    h = torch.stack([torch.randperm(neurons) for _ in range(tokens)]).to(dtype) - neurons // 3  # no equal values
    h = h if dtype == torch.float32 else h.clamp(-100, 100)
    counts = kernels.core_counts(h, k)
    marked = torch.stack([(row > 0) & (row >= row.sort(descending=True).values[k - 1]) for row in h])
    if dtype == torch.float32:
        assert torch.equal(counts, marked.sum(0))
    else:  # of equal values some are marked
        positives = (h > 0).sum(1).clamp(max=k)
        assert int(counts.sum()) == int(positives.sum())
        assert bool((counts <= marked.sum(0)).all())


@pytest.mark.skipif(not kernels.available(), reason="no native kernels")
def test_what_does_not_fit_is_refused():
    step = Step((4, 2, 8, 32, 5, 0), torch.float32)
    step.length = 8  # the capacity
    with pytest.raises(ValueError, match=r"length must be in \[0, 8\)"):
        step.run(kernels.attention_step, Projections.of(step.linears), lambda part: part)
    with pytest.raises(ValueError, match="like x"):
        kernels.add_norm(torch.ones(1, 1, 4), torch.ones(1, 1, 4).half(), torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="one token"):
        kernels.dense_ffn(torch.ones(2, 4), Projections.of([(torch.ones(4, 4), None)] * 3), "silu")


def test_kinds_of_weights_are_not_mixed():
    weight = torch.randn(32, 32)
    assert Projections.of([(weight, None), (kernels.quantize(weight, 8), None)]) is None
    assert Projections.of([(weight, None), None]) is None
