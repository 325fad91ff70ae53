"""Layers in one native call, against the operations that they are made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import ActiveNeurons, AttentionLayer, Decoder, Projections

from .helpers import ffn

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, NEURONS, LENGTH = 64, 4, 2, 16, 96, 5
native = pytest.mark.skipif(not kernels.available(), reason="no native kernels")
KINDS = {"float32": None, "bfloat16": None, "int8": kernels.INT8, "int4": kernels.INT4}


@pytest.fixture(params=KINDS)
def model(request, variant):
    if variant == "reference":
        pytest.skip("there is no decoder without the native kernels")
    return Model(request.param)


class PlainModel:
    """As OPT: LayerNorms, learned positions, biases, FFNs without a gate; three layers: dense, some neurons, neurons chosen by size."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        shapes = [(HIDDEN, HIDDEN)] * 4
        self.layers = [
            AttentionLayer(
                *torch.randn(2, HIDDEN),
                self.projections(*shapes),
                1e-5,
                HEAD_SIZE**-0.5,
                norm_bias=torch.randn(HIDDEN),
                next_norm_bias=torch.randn(HIDDEN),
            )
            for _ in range(3)
        ]
        self.dense = self.projections((NEURONS, HIDDEN), (HIDDEN, NEURONS))
        self.rows = self.projections((NEURONS, HIDDEN), (NEURONS, HIDDEN))
        self.rows.biases[1] = None  # what is added to the output is a vector like any other
        self.size, self.added = torch.rand(NEURONS), torch.randn(HIDDEN)
        self.last_norm = torch.randn(2, HIDDEN)
        self.ends = self.projections((11, HIDDEN)), self.projections((13, HIDDEN))
        self.ends[0].biases[0] = None
        self.position = torch.randn(HIDDEN)
        self.index = torch.tensor([60, 44], dtype=torch.int32)
        self.caches = torch.randn(2, 3, 1, HIDDEN // HEAD_SIZE, LENGTH + 2, HEAD_SIZE)

    @staticmethod
    def projections(*shapes: tuple[int, int]) -> Projections:
        return Projections.of([(torch.randn(shape) * shape[1] ** -0.5, torch.randn(shape[0])) for shape in shapes])


@native
def test_a_plain_model_equals_its_operations():
    model = PlainModel()
    decoder, caches, expected_caches = Decoder(), model.caches.clone(), model.caches.clone()
    for layer in model.layers:
        decoder.add_layer(layer, HEAD_SIZE)
    decoder.set_dense(0, model.dense, "relu")
    decoder.set_active(1, ActiveNeurons(model.rows, "relu", 40, model.index, added=[model.added]))
    decoder.set_active(2, ActiveNeurons(model.rows, "relu", 80, None, model.size, 25, added=[model.added]))
    decoder.set_norm(*model.last_norm, 1e-5)
    decoder.set_embedding_and_head(*model.ends)
    logits, computed, _ = decoder.logits(7, model.position, (None, None), tuple(list(part) for part in caches), LENGTH)

    rows, biases = model.rows.weights, model.rows.biases
    ffns = [
        lambda x: kernels.dense_ffn(x, model.dense, "relu"),
        lambda x: ffn(x, rows, 40, model.index, biases=biases) + model.added,
        lambda x: ffn(x, rows, 80, biases=biases, size=model.size, keep_count=25) + model.added,
    ]
    x, delta = (model.ends[0].weights[0][7] + model.position).view(1, 1, HIDDEN), None
    for number, (layer, of_layer) in enumerate(zip(model.layers, ffns, strict=True)):
        cache = expected_caches[0][number], expected_caches[1][number]
        x, normed = kernels.attention_step(x, delta, layer, (None, None), cache, LENGTH)
        delta = of_layer(normed)
    hidden = kernels.add_norm(x, delta, *model.last_norm, 1e-5)
    assert torch.equal(logits, kernels.linear(hidden, model.ends[1].weights[0], model.ends[1].biases[0]))
    assert torch.equal(caches, expected_caches)
    assert computed.tolist()[:2] == [0, 42]
    assert 0 < computed[2] <= 25  # ReLU may leave fewer


class Model:
    """Three layers: dense, some neurons, neurons chosen by the token."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.format = KINDS[kind]
        self.dtype = torch.float32 if kind == "float32" else torch.bfloat16
        queries, keys = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
        self.layers = [
            AttentionLayer(
                self.norm(),
                self.norm(),
                self.projections((queries, HIDDEN), (keys, HIDDEN), (keys, HIDDEN), (HIDDEN, queries)),
                1e-5,
                HEAD_SIZE**-0.5,
            )
            for _ in range(3)
        ]
        self.dense = self.projections((NEURONS, HIDDEN), (NEURONS, HIDDEN), (HIDDEN, NEURONS))
        self.rows = self.projections(*[(NEURONS, HIDDEN)] * 3, summed=True)
        self.index = torch.tensor([40, 90, 33], dtype=torch.int32)
        self.size, self.added = torch.rand(NEURONS), torch.randn(2, HIDDEN).to(self.dtype)
        self.last_norm = self.norm()
        self.x, self.first_delta = torch.randn(2, 1, 1, HIDDEN).to(self.dtype)
        angles = torch.rand(1, 1, HEAD_SIZE)
        self.rope = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        self.caches = torch.randn(2, 3, 1, KV_HEADS, LENGTH + 2, HEAD_SIZE).to(self.dtype)

    def norm(self) -> torch.Tensor:
        return (1 + torch.randn(HIDDEN) / 10).to(self.dtype)

    def projections(self, *shapes: tuple[int, int], summed: bool = False) -> Projections:
        """summed: the last one's rows are, so it has column scales if it is quantised."""
        weights = [torch.randn(shape) * shape[1] ** -0.5 for shape in shapes]
        kept = [kernels.quantize(w, self.format) if self.format else w.to(self.dtype) for w in weights]
        if summed and self.format:
            kept[-1] = kernels.quantize(weights[-1], self.format, None, torch.rand(HIDDEN) + 0.5)
        return Projections.of([(weight, None) for weight in kept])

    def native(self) -> Decoder:
        decoder = Decoder()
        for layer in self.layers:
            decoder.add_layer(layer, HEAD_SIZE)
        decoder.set_dense(0, self.dense, "silu")
        decoder.set_active(1, ActiveNeurons(self.rows, "silu", 30, self.index, added=list(self.added)))
        decoder.set_active(2, ActiveNeurons(self.rows, "silu", 80, None, self.size, 25))
        decoder.set_norm(self.last_norm, None, 1e-6)
        return decoder

    def run(self, decoder: Decoder, layers: range, x, delta, caches):
        keys, values = ([part[n] for n in layers] for part in caches)
        return decoder.run(layers, x, delta, self.rope, (keys, values), LENGTH)

    def one_by_one(self, caches) -> tuple[torch.Tensor, torch.Tensor]:
        x, delta = self.x, self.first_delta
        rows = [self.rows.weight(number) for number in range(3)]
        ffns = [
            lambda x: kernels.dense_ffn(x, self.dense, "silu"),
            lambda x: ffn(x, rows, 30, self.index) + self.added[0] + self.added[1],
            lambda x: ffn(x, rows, 80, size=self.size, keep_count=25),
        ]
        for number, (layer, of_layer) in enumerate(zip(self.layers, ffns, strict=True)):
            cache = caches[0][number], caches[1][number]
            x, normed = kernels.attention_step(x, delta, layer, self.rope, cache, LENGTH)
            delta = of_layer(normed)
        return x + delta, kernels.add_norm(x, delta, self.last_norm, None, 1e-6)


def test_equals_the_operations_bit_for_bit(model):
    expected_cache, cache = model.caches.clone(), model.caches.clone()
    expected = model.one_by_one(expected_cache)
    decoder = model.native()
    x, hidden, computed = model.run(decoder, range(3), model.x, model.first_delta, cache)
    assert torch.equal(x, expected[0])
    assert torch.equal(hidden, expected[1])
    assert torch.equal(cache, expected_cache)
    assert computed.tolist() == [0, 33, 25]


def test_parts_are_the_whole(model):
    cache = model.caches.clone()
    _, expected, _ = model.run(model.native(), range(3), model.x, model.first_delta, model.caches.clone())
    decoder = model.native()
    x, delta, _ = model.run(decoder, range(1), model.x, model.first_delta, cache)
    _, hidden, _ = model.run(decoder, range(1, 3), x, delta, cache)
    assert torch.equal(hidden, expected)


def test_logits_are_those_of_embeddings_layers_and_head(model):
    embedding, head = model.projections((11, HIDDEN)), model.projections((13, HIDDEN))
    decoder, cache, expected_cache = model.native(), model.caches.clone(), model.caches.clone()
    decoder.set_embedding_and_head(embedding, head)
    logits, computed, exact = decoder.logits(7, None, model.rope, tuple(list(part) for part in cache), LENGTH)
    assert exact == 13
    rows, columns = (part.weight(0) for part in (embedding, head))
    x = (kernels.dequantize(rows, model.dtype) if model.format else rows)[7].view(1, 1, HIDDEN)
    _, hidden, expected = model.run(decoder, range(3), x, None, expected_cache)
    assert torch.equal(logits, kernels.linear(hidden, columns))
    assert torch.equal(computed, expected)
    assert torch.equal(cache, expected_cache)


def test_logits_of_ends_in_planes_are_screened(model):
    generator = torch.Generator().manual_seed(5)
    values = kernels.quantize(torch.randn(900, HIDDEN, generator=generator), kernels.INT8)
    packed = kernels.split_planes(values)
    screen, ends = kernels.Screen.of(packed), Projections.of([(packed, None)])
    decoder, cache, expected_cache = model.native(), model.caches.clone(), model.caches.clone()
    decoder.set_embedding_and_head(ends, ends, screen)
    x = kernels.dequantize(values, model.dtype)[7].view(1, 1, HIDDEN)
    _, hidden, expected = model.run(decoder, range(3), x, None, expected_cache)
    for needed in (kernels.SOFTMAX, kernels.Needed(largest=1)):
        logits, computed, exact = decoder.logits(
            7, None, model.rope, tuple(list(part) for part in cache), LENGTH, needed
        )
        screened, count = kernels.screened_linear(hidden, packed, screen, needed)
        assert torch.equal(logits, screened)
        assert exact == int(count)
        assert torch.equal(computed, expected)
    with pytest.raises(ValueError, match="head must have two dimensions"):
        decoder.set_embedding_and_head(ends, ends)
    if model.format is None:
        floats = kernels.dequantize(values, model.dtype)
        high = kernels.Screen(screen.data[0], screen.scales, screen.errors)
        decoder.set_embedding_and_head(Projections.of([(floats, None)]), Projections.of([(floats, None)]), high)
        logits, _, exact = decoder.logits(7, None, model.rope, tuple(list(part) for part in cache), LENGTH)
        screened, count = kernels.screened_linear(hidden, floats, high)
        assert torch.equal(logits, screened)
        assert exact == int(count)


def test_what_a_layer_computes_can_be_set_again(model):
    decoder = model.native()
    _, _, before = model.run(decoder, range(3), model.x, None, model.caches.clone())
    decoder.set_active(1, ActiveNeurons(model.rows, "silu", 7))
    decoder.set_active(2, ActiveNeurons(model.rows, "silu", 80, None, model.size, threshold=1e30))
    _, _, after = model.run(decoder, range(3), model.x, None, model.caches.clone())
    assert (before.tolist(), after.tolist()) == ([0, 33, 25], [0, 7, 0])


@native
def test_weights_live_as_long_as_the_decoder():
    model = Model("float32")
    expected = model.run(model.native(), range(3), model.x, None, model.caches.clone())[1]
    decoder = model.native()
    model.rows = model.dense = model.layers = model.last_norm = model.size = model.index = model.added = None
    assert torch.equal(model.run(decoder, range(3), model.x, None, model.caches.clone())[1], expected)


@native
def test_what_does_not_fit_is_an_error():
    model = Model("float32")
    decoder, cache = model.native(), model.caches
    with pytest.raises(ValueError, match="there are 3 layers, got number 3"):
        decoder.set_dense(3, model.dense, "silu")
    with pytest.raises(ValueError, match="expected keys and values of some of 3 layers, got layers 2 to 4"):
        decoder.run(range(2, 4), model.x, None, model.rope, ([cache[0][0]] * 2, [cache[1][0]] * 2), LENGTH)
    with pytest.raises(ValueError, match="x must be one token of 64 Float"):
        model.run(decoder, range(3), model.x.bfloat16(), None, cache)
    with pytest.raises(ValueError, match=r"length must be in \[0, 7\), got 7"):
        decoder.run(range(1), model.x, None, model.rope, ([cache[0][0]], [cache[1][0]]), LENGTH + 2)
    with pytest.raises(ValueError, match="index must be in"):
        decoder.set_active(1, ActiveNeurons(model.rows, "silu", 50, model.index))
    with pytest.raises(ValueError, match="can't compute these neurons"):
        decoder.set_active(2, ActiveNeurons(model.rows, "silu", 80, None, model.size, 25, by_gate=True))
    with pytest.raises(ValueError, match="keep_count must be at most the 80 candidates, got 81"):
        decoder.set_active(2, ActiveNeurons(model.rows, "silu", 80, None, model.size, 81))
    unfinished = Decoder()
    unfinished.add_layer(model.layers[0], HEAD_SIZE)
    with pytest.raises(ValueError, match="a layer has no FFN yet"):
        model.run(unfinished, range(1), model.x, None, cache)
    unfinished.set_dense(0, model.dense, "silu")
    with pytest.raises(ValueError, match="needs a norm behind it"):
        model.run(unfinished, range(1), model.x, None, cache)
    with pytest.raises(ValueError, match="set_embedding_and_head first"):
        decoder.logits(0, None, model.rope, (list(cache[0]), list(cache[1])), LENGTH)
    rows = model.projections((11, HIDDEN))
    with pytest.raises(ValueError, match="set_norm first"):
        unfinished.set_embedding_and_head(rows, rows)
    with pytest.raises(ValueError, match="columns|hidden|64"):
        decoder.set_embedding_and_head(rows, model.projections((11, 32)))
    decoder.set_embedding_and_head(rows, rows)
    with pytest.raises(ValueError, match="token ids are 0 to 10, got 11"):
        decoder.logits(11, None, model.rope, (list(cache[0]), list(cache[1])), LENGTH)


@native
def test_every_layer_and_every_device_is_checked():
    model, other = Model("float32"), Model("bfloat16")
    decoder = Decoder()
    decoder.add_layer(model.layers[0], HEAD_SIZE)
    with pytest.raises(
        ValueError, match="all layers must have the hidden size and the type of the first, 64 and Float"
    ):
        decoder.add_layer(other.layers[1], HEAD_SIZE)
    for size in (0, -16, 15):
        with pytest.raises(ValueError, match=f"a head must have an even size above 0, got {size}"):
            decoder.add_layer(model.layers[1], size)
    with pytest.raises(ValueError, match="window must be"):
        decoder.add_layer(replace(model.layers[1], window=-1), HEAD_SIZE)
    with pytest.raises(ValueError, match=r"norm must be \[hidden\]"):
        decoder.add_layer(replace(model.layers[1], norm=model.layers[1].norm.view(8, 8)), HEAD_SIZE)
    mixed = replace(model.layers[1].projections, weights=list(model.layers[1].projections.weights))
    mixed.weights[1] = mixed.weights[1].bfloat16()
    with pytest.raises(ValueError, match="q, k and v must all have the same type"):
        decoder.add_layer(replace(model.layers[1], projections=mixed), HEAD_SIZE)
    for elsewhere in (lambda t: t.to("meta"), torch._neg_view):
        with pytest.raises(ValueError, match="expected a plain tensor on the CPU"):
            decoder.add_layer(replace(model.layers[1], next_norm=elsewhere(model.layers[1].next_norm)), HEAD_SIZE)
    freed = model.layers[1].norm.clone()
    freed.untyped_storage().resize_(8)
    with pytest.raises(ValueError, match="a storage of 8 bytes, it needs 256"):
        decoder.add_layer(replace(model.layers[1], norm=freed), HEAD_SIZE)
    with pytest.raises(ValueError, match="has no neurons"):
        decoder.set_dense(
            0, Projections.of([(torch.empty(0, HIDDEN), None)] * 2 + [(torch.empty(HIDDEN, 0), None)]), "silu"
        )
    planes = kernels.split_planes(kernels.quantize(torch.randn(11, 32), kernels.INT8))
    decoder.set_norm(model.last_norm, None, 1e-6)
    with pytest.raises(ValueError, match="embedding must have 64 columns, got 32"):
        decoder.set_embedding_and_head(Projections.of([(planes, None)]), model.projections((11, HIDDEN)))
    floats = Projections([torch.randn(2, 11, 32)], [], [None], None)
    with pytest.raises(ValueError, match="embeddings in planes are quantised to 8 bits"):
        decoder.set_embedding_and_head(floats, model.projections((11, HIDDEN)))


@native
def test_what_was_set_before_a_refusal_holds():
    model = Model("float32")
    expected = model.run(model.native(), range(3), model.x, None, model.caches.clone())[1]
    decoder = model.native()
    other = model.projections(*[(NEURONS, HIDDEN)] * 3)
    with pytest.raises(ValueError, match="added must be"):
        decoder.set_active(1, ActiveNeurons(other, "silu", 30, None, added=[torch.zeros(3)]))
    with pytest.raises(ValueError, match="activation must be"):
        decoder.set_dense(0, model.dense, "sine")
    del other
    assert torch.equal(model.run(decoder, range(3), model.x, None, model.caches.clone())[1], expected)


@native
def test_a_refused_token_leaves_the_caches_alone():
    model = Model("float32")
    decoder, caches = model.native(), model.caches.clone()
    keys, values = list(caches[0]), list(caches[1])
    unfinished = Decoder()
    for layer in model.layers:
        unfinished.add_layer(layer, HEAD_SIZE)
    unfinished.set_dense(0, model.dense, "silu")
    with pytest.raises(ValueError, match="for layer 1"):
        unfinished.run(range(3), model.x, None, model.rope, (keys, values), LENGTH)
    for wrong in (values[2][:, :, :-1], values[2].bfloat16(), values[2].to("meta"), values[2][0]):
        with pytest.raises(ValueError, match="keys and values must be|on the CPU"):
            decoder.run(range(3), model.x, None, model.rope, (keys, [*values[:2], wrong]), LENGTH)
    for length in (-1, LENGTH + 2, 2**63 - 1):
        with pytest.raises(ValueError, match="length must be in"):
            decoder.run(range(3), model.x, None, model.rope, (keys, values), length)
    with pytest.raises(ValueError, match="cosine and sine belong together"):
        decoder.run(range(3), model.x, None, (model.rope[0], None), (keys, values), LENGTH)
    with pytest.raises(ValueError, match="sine must be"):
        decoder.run(range(3), model.x, None, (model.rope[0], model.rope[1][..., :8]), (keys, values), LENGTH)
    assert torch.equal(caches, model.caches)
