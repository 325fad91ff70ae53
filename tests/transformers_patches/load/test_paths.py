"""What is said about a model's layers is what they do."""

import pytest

from tests.conftest import LAYERS
from transformers_patches.load.paths import DECODER, FFN, LINEAR, TORCH, in_words, layer_paths


@pytest.mark.parametrize(
    "family, kernels, expected",
    [
        ("llama", "native", [DECODER] * LAYERS),
        ("gemma2", "native", [LINEAR, *[FFN] * 4, LINEAR]),
        ("llama", "torch", [TORCH] * LAYERS),
    ],
)
def test_layers_take_the_path_that_is_said(native, loaded, family, kernels, expected):
    ours = loaded(family, "partinfer", kernels=kernels)
    assert layer_paths(ours.model, native=ours.run.native) == expected


def test_paths_in_words():
    assert in_words([LINEAR, FFN, FFN]) == "1 layers: native linear layers, 2 layers: native FFN"
