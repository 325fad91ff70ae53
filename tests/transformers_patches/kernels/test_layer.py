"""The operations of a decoder layer on one token, against float64 in PyTorch."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import AttentionLayer, Projections, reference

from .helpers import OF_BITS, TOLERANCE, error

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

    def __init__(
        self,
        size: tuple[int, ...],
        dtype: torch.dtype,
        *,
        bias: bool = False,
        head_norms: bool = False,
        like_opt: bool = False,
    ):
        """like_opt: LayerNorms, and nothing is rotated."""
        heads, kv_heads, head_dim, hidden, self.length, self.window = size
        queries, keys = heads * head_dim, kv_heads * head_dim
        shapes = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
        self.linears = linears(*shapes, dtype=dtype, bias=bias)
        self.x, self.delta = torch.randn(2, 1, 1, hidden).to(dtype)
        self.norm, self.next_norm = (1 + torch.randn(2, hidden) / 10).to(dtype)
        self.head_norms = (1 + torch.randn(2, head_dim) / 10).to(dtype) if head_norms else (None, None)
        self.norm_biases = torch.randn(2, hidden).to(dtype) if like_opt else (None, None)
        angles = torch.rand(head_dim // 2).repeat(2) * 6
        self.rope = (None, None) if like_opt else (angles.cos().to(dtype), angles.sin().to(dtype))
        self.cache = torch.randn(2, 1, kv_heads, self.length + 3, head_dim).to(dtype)

    def run(self, step, projections, cast) -> tuple[torch.Tensor, ...]:
        keys, values = (cast(part).clone() for part in self.cache)
        vectors = (*self.head_norms, *self.norm_biases, *self.rope)
        *norms, bias, next_bias, cosine, sine = (None if vector is None else cast(vector) for vector in vectors)
        x, delta, norm, next_norm = (cast(v) for v in (self.x, self.delta, self.norm, self.next_norm))
        scale = keys.shape[-1] ** -0.5
        settings = AttentionLayer(
            norm, next_norm, projections, 1e-5, scale, *norms, self.window, norm_bias=bias, next_norm_bias=next_bias
        )
        sums = step(x, delta, settings, (cosine, sine), (keys, values), self.length)
        return *sums, keys[:, :, : self.length + 1], values[:, :, : self.length + 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention_step(variant, dtype, size):
    for options in ({}, {"bias": True}, {"head_norms": True}, {"bias": True, "like_opt": True}):
        step = Step(size, dtype, **options)
        result = step.run(kernels.attention_step, Projections.of(step.linears), lambda part: part)
        expected = step.run(reference.attention_step, doubled(step.linears), torch.Tensor.double)
        for name, ours, theirs in zip(("sum", "next", "keys", "values"), result, expected, strict=True):
            assert ours.dtype == dtype
            assert error(ours, theirs) < TOLERANCE[dtype], f"{name} {options}"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_projections(variant, bits):
    step = Step((4, 2, 32, 64, 20, 0), torch.bfloat16)
    packed = [(kernels.quantize(weight, OF_BITS[bits]), bias) for weight, bias in step.linears]
    plain = [(kernels.dequantize(weight).double(), bias) for weight, bias in packed]
    result = step.run(kernels.attention_step, Projections.of(packed), lambda part: part)
    expected = step.run(reference.attention_step, Projections.of(plain), torch.Tensor.double)
    for ours, theirs in zip(result, expected, strict=True):
        assert error(ours, theirs) < 2e-2  # the inputs are rounded to 8 bits, too


@pytest.mark.parametrize(
    "size", [(32, 8, 64, 512, 700, 0), (9, 3, 64, 64, 90, 0), (64, 64, 128, 64, 2, 0), (4, 1, 64, 64, 900, 500)]
)
@pytest.mark.parametrize("several", [1, 2, 3, 5])
def test_any_number_of_threads(variant, threads, several, size):
    """Each has some of the positions; there may be fewer positions than threads."""
    threads(several)
    step = Step(size, torch.float32)
    result = step.run(kernels.attention_step, Projections.of(step.linears), lambda part: part)
    expected = step.run(reference.attention_step, doubled(step.linears), torch.Tensor.double)
    assert all(error(ours, theirs) < 1e-5 for ours, theirs in zip(result, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden, neurons", [(32, 80), (576, 1536), (7, 13)])
def test_dense_ffn(variant, dtype, hidden, neurons):
    x = torch.randn(1, 1, hidden).to(dtype)
    for bias in (False, True):
        gated = linears((neurons, hidden), (neurons, hidden), (hidden, neurons), dtype=dtype, bias=bias)
        for ours in (gated, [gated[0], gated[2]]):  # without a gate fc1 and fc2
            for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
                result = kernels.dense_ffn(x, Projections.of(ours), activation)
                expected = reference.dense_ffn(x.double(), doubled(ours), activation)
                assert error(result, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 31, 576])
def test_add_norm(variant, dtype, hidden):
    x, delta = torch.randn(2, 1, 1, hidden).to(dtype)
    weight, bias = torch.randn(2, hidden).to(dtype)
    expected = reference.norm(x.double() + delta.double(), weight.double(), None, 1e-6)
    assert error(kernels.add_norm(x, delta, weight, None, 1e-6), expected) < TOLERANCE[dtype]
    x = x + 3  # a LayerNorm takes the mean away
    expected = reference.norm((x + delta).double(), weight.double(), bias.double(), 1e-5)
    assert error(kernels.add_norm(x, delta, weight, bias, 1e-5), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, neurons, part", [(1, 7, 0.6), (40, 530, 0.2), (9, 64, 1.0), (5, 100, 0.01), (70, 1075, 0.2)]
)
def test_core_counts(variant, dtype, tokens, neurons, part):
    h = torch.stack([torch.randperm(neurons) for _ in range(tokens)]).to(dtype) - neurons // 3  # no equal values
    h = h if dtype == torch.float32 else h.clamp(-100, 100)
    counts = kernels.core_counts(h, part)
    k = int(part * int((h > 0).sum()) / tokens)
    marked = (h > 0) & (h >= h.sort(descending=True, dim=1).values[:, max(k, 1) - 1 : max(k, 1)]) & (k > 0)
    if dtype == torch.float32:
        assert torch.equal(counts, marked.sum(0))
    else:  # of equal values some are marked
        positives = (h > 0).sum(1).clamp(max=k)
        assert int(counts.sum()) == int(positives.sum())
        assert bool((counts <= marked.sum(0)).all())


@pytest.mark.skipif(not kernels.available(), reason="no native kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neurons", [5, 64, 130, 1075])
def test_of_equal_activations_the_first_are_marked(variant, dtype, neurons):
    if variant == "reference":
        pytest.skip("PyTorch marks others")
    h = torch.randint(-2, 3, (30, neurons), generator=torch.Generator().manual_seed(neurons)).to(dtype)
    k = int(0.3 * int((h > 0).sum()) / len(h))
    marked = torch.zeros(neurons, dtype=torch.int64)
    for row in h:
        best = row.argsort(descending=True, stable=True)[:k]
        marked[best[row[best] > 0]] += 1
    assert torch.equal(kernels.core_counts(h, 0.3), marked)


def test_core_counts_of_infinities(variant):
    h = torch.tensor([[float("inf"), 1.0, -1.0, -float("inf"), 2.0, 0.5]])
    assert kernels.core_counts(h, 0.5).tolist() == [1, 0, 0, 0, 1, 0]  # 4 above 0, so 2 are marked


@pytest.mark.parametrize("neurons, first, wanted", [(1, 0, 1), (7, 3, 0), (7, 2, 5), (130, 0, 31), (1075, 461, 153)])
@pytest.mark.parametrize("highest", [0, 3, 5000])
def test_most_marked(variant, neurons, first, wanted, highest):
    generator = torch.Generator().manual_seed(neurons + highest)
    counts = torch.randint(0, highest + 1, (neurons,), generator=generator)
    priority = torch.randperm(2 * neurons, generator=generator)[:neurons]
    chosen = kernels.most_marked(counts, priority, first, wanted)
    order = sorted(range(first, neurons), key=lambda i: (-int(counts[i]), int(priority[i])))
    assert chosen.dtype == torch.int32
    assert chosen.tolist() == sorted(order[:wanted])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, neurons", [(0, 5), (1, 1), (3, 31), (4, 64), (9, 130), (130, 1075), (515, 150)])
def test_sum_of_squares(variant, dtype, tokens, neurons):
    values = torch.randn(tokens, 2 * neurons).to(dtype)
    for part in (values[:, :neurons].contiguous(), values[:, neurons:]):
        sums = kernels.sum_of_squares(part)
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums, part.double().square().sum(0).float(), rtol=1e-5, atol=0)


def test_sum_of_squares_of_infinities(variant):
    values = torch.ones(6, 3)
    values[5, 1], values[2, 2] = -float("inf"), float("nan")
    torch.testing.assert_close(
        kernels.sum_of_squares(values), torch.tensor([6.0, float("inf"), float("nan")]), equal_nan=True
    )


@pytest.mark.parametrize("tokens, neurons", [(0, 5), (1, 1), (7, 1075)])
@pytest.mark.parametrize("with_prior", [True, False])
def test_typical_scale(variant, tokens, neurons, with_prior):
    sums, prior, norms = torch.rand(3, neurons)
    sums = sums * tokens
    known = prior.double().square() if with_prior else sums.double().mean() / max(tokens, 1)
    scale = kernels.typical_scale(sums, tokens, prior if with_prior else None, 20, norms)
    expected = ((sums.double() + 20 * known) / (tokens + 20)).sqrt() * norms
    torch.testing.assert_close(scale, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.skipif(not kernels.available(), reason="no native kernels")
def test_what_does_not_fit_is_refused():
    step = Step((4, 2, 8, 32, 5, 0), torch.float32)
    step.length = 8  # the capacity
    with pytest.raises(ValueError, match=r"length must be in \[0, 8\)"):
        step.run(kernels.attention_step, Projections.of(step.linears), lambda part: part)
    with pytest.raises(ValueError, match="like x"):
        kernels.add_norm(torch.ones(1, 1, 4), torch.ones(1, 1, 4).half(), torch.ones(4), None, 1e-5)
    step = Step((4, 2, 8, 32, 5, 0), torch.float32)
    step.rope = (step.rope[0], None)
    with pytest.raises(ValueError, match="cosine and sine belong together"):
        step.run(kernels.attention_step, Projections.of(step.linears), lambda part: part)
    step.norm_biases = (step.norm, None)
    with pytest.raises(ValueError, match="all be RMSNorms or all be LayerNorms"):
        step.run(kernels.attention_step, Projections.of(step.linears), lambda part: part)
    with pytest.raises(ValueError, match=r"matrices don't fit: \[4, 4\], \[5, 4\]$"):
        kernels.dense_ffn(torch.ones(1, 4), Projections.of([(torch.ones(n, 4), None) for n in (4, 5)]), "relu")
    numbers = torch.arange(4)
    with pytest.raises(ValueError, match="choose 3 of 4 neurons from position 2 on"):
        torch.ops.partinfer.most_marked(numbers, numbers, 2, 3)
    with pytest.raises(ValueError, match=r"contiguous int64 \[4\]"):
        torch.ops.partinfer.most_marked(numbers, numbers.int(), 0, 1)
    with pytest.raises(ValueError, match=r"contiguous float32 \[3\]"):
        torch.ops.partinfer.typical_scale(torch.ones(3), 1, None, 1, torch.ones(4))
    with pytest.raises(ValueError, match=r"\[tokens, neurons\], got \[4\]"):
        torch.ops.partinfer.sum_of_squares(torch.ones(4))
    with pytest.raises(ValueError, match="one token"):
        kernels.dense_ffn(torch.ones(2, 4), Projections.of([(torch.ones(4, 4), None)] * 3), "silu")


def test_kinds_of_weights_are_not_mixed():
    weight = torch.randn(32, 32)
    assert Projections.of([(weight, None), (kernels.quantize(weight, kernels.INT8), None)]) is None
    assert Projections.of([(weight, None), None]) is None
