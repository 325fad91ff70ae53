"""Layer by layer gives what the whole model gives, in every family."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from profiler.layerwise import FFNWeights, LayerwiseModel, make_batches
from tests.conftest import LAYERS, VOCABULARY

LENGTHS = [9, 4, 12, 7, 12]


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def load(checkpoint) -> LayerwiseModel:
    return LayerwiseModel(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))


def test_batches_hold_every_token_once():
    batches = make_batches(sequences(), [6, 3, 8, 7, 1], batch_size=2)
    assert sum(int(batch.prompt.sum()) for batch in batches) == 25
    assert sum(int(batch.real.sum()) for batch in batches) == sum(LENGTHS)
    assert not any(bool((batch.prompt & batch.decoded).any()) for batch in batches)
    tokens = sorted(ids[mask].tolist() for batch in batches for ids, mask in zip(batch.ids, batch.real, strict=True))
    assert tokens == sorted(sequences())


@torch.no_grad()
def test_layers_one_by_one_are_the_model(checkpoint):
    layerwise = load(checkpoint)
    for batch in make_batches(sequences(), LENGTHS, batch_size=3):
        hidden = layerwise.inputs(batch)
        for layer in range(LAYERS - 1):
            hidden = layerwise.run(layer, hidden)
        for row, (ids, mask) in enumerate(zip(batch.ids, batch.real, strict=True)):
            alone = layerwise.model(ids[mask][None], output_hidden_states=True).hidden_states[LAYERS - 1][0]
            assert (hidden[row][mask] - alone).abs().max() < 1e-4  # of values around 10


@torch.no_grad()
def test_an_ffn_made_of_its_neurons_is_the_layers_own(checkpoint):
    layerwise = load(checkpoint)
    batch = make_batches(sequences(), LENGTHS, batch_size=5)[0]
    hidden = layerwise.inputs(batch)
    expected = layerwise.run(2, hidden)
    weights = FFNWeights.of(layerwise.model, 2)

    def compute(x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == 2
        y = weights.output(weights.activations(x)[0])
        return y if weights.output_bias is None else y + weights.output_bias

    with layerwise.ffn_replaced(2, compute):
        replaced = layerwise.run(2, hidden)
    assert (replaced - expected).abs().max() < 1e-5
    with layerwise.ffn_replaced(2, torch.zeros_like):
        assert (layerwise.run(2, hidden) - expected).abs().max() > 1e-3  # the replacement is what counted
    assert torch.equal(layerwise.run(2, hidden), expected)
