"""Loaded models and their references, each made once and shared by the tests, as by the requests of a program."""

from functools import cache

import pytest

from tests.transformers_patches.masked_reference import MaskedReference
from tests.transformers_patches.model_passes import DATASET, METHODS, MODEL
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model


@pytest.fixture(scope="session")
def loaded(tiny_checkpoints):
    """loaded(family, method, **settings): layers 1 to 4 sparse, float32."""

    @cache
    def load(family: str, method: str, **settings):
        config = PartInferConfig(**METHODS[method], **settings, start_num=1, end_num=4, dtype="float32", device="cpu")
        return load_model(tiny_checkpoints[family], config, DATASET, MODEL)

    return load


@pytest.fixture(scope="session")
def references(tiny_checkpoints):
    return cache(lambda family: MaskedReference(tiny_checkpoints[family]))


@pytest.fixture
def native():
    """Skips where no kernels could be compiled."""
    if not kernels.available():
        pytest.skip(f"no native kernels: {kernels.why_not()}")
