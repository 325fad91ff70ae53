"""Another bound on the loss, and dense, for a model that is loaded already."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conftest import random_neuron_file
from tests.transformers_patches.made_up_files import made_up_ladder
from tests.transformers_patches.neurons.test_loss_curve import curve
from tests.transformers_patches.plan.test_max_loss import with_curve
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.load.other_settings import MOST_KEPT, OtherSettings, Setting
from transformers_patches.plan.resolve import RunFiles

NEURONS = with_curve()
IDS = torch.tensor([[5, 9, 17, 3, 44, 60, 71, 8, 12, 100, 31, 7]])


def load(folder, **settings):
    return load_model(folder, PartInferConfig(**settings, dtype="float32", device="cpu"), NEURONS)


def answer(loaded) -> list[int]:
    made = loaded.model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return made[0].tolist()


@pytest.fixture
def switched(tiny_checkpoints):
    loaded = load(tiny_checkpoints["llama"], max_loss=0.1)
    return loaded, OtherSettings(loaded, RunFiles(NEURONS))


@pytest.mark.parametrize("bound", [0.0, 0.02, 0.1, 0.5])
def test_answers_are_those_of_a_model_loaded_with_the_bound(switched, tiny_checkpoints, bound):
    loaded, settings = switched
    other = load(tiny_checkpoints["llama"], max_loss=bound)
    own = answer(loaded)
    settings.use(Setting(bound))
    assert answer(loaded) == answer(other)
    loaded.reset_counters()
    other.reset_counters()
    assert answer(loaded) == answer(other)
    assert loaded.bytes_fraction() == other.bytes_fraction()
    assert loaded.run.predicted_loss == other.run.predicted_loss
    settings.use(Setting())
    assert answer(loaded) == own


def test_dense_computes_everything(switched, tiny_checkpoints):
    loaded, settings = switched
    dense = load(tiny_checkpoints["llama"], method="dense")
    settings.use(Setting(dense=True))
    loaded.reset_counters()
    assert answer(loaded) == answer(dense)
    assert loaded.computed_fraction() == loaded.bytes_fraction() == 1.0
    assert loaded.run.predicted_loss == 0.0


def test_equal_settings_have_equal_keys_and_few_are_kept(switched):
    loaded, settings = switched
    assert settings.use(Setting()) == settings.use(Setting(0.1)) == "own"
    assert settings.use(Setting(0.5)) == settings.use(Setting(0.6)) != "own"
    for bound in range(30):
        settings.use(Setting(0.02 + bound / 100))
    assert len(settings._kept) <= MOST_KEPT
    assert answer(loaded)


def test_what_needs_other_weights_is_refused(tiny_checkpoints, neuron_files):
    loaded = load(tiny_checkpoints["llama"], sparsity=0.4, start_num=1, end_num=4)
    settings = OtherSettings(loaded, RunFiles(NEURONS))
    before = answer(loaded)
    with pytest.raises(PartInferError, match="start the server with --max_loss"):
        settings.use(Setting(0.1))
    with pytest.raises(PartInferError, match="70% are loaded"):
        settings.use(Setting(dense=True))
    with pytest.raises(PartInferError, match="leave one of them out"):
        Setting(0.1, dense=True)
    assert answer(loaded) == before
    assert settings.described()["dense"] is False
    assert settings.described()["bounds"] == []


def test_neurons_in_another_order_are_refused(tiny_checkpoints):
    """With two rankings, fewer base neurons than the loaded ones put other neurons first."""
    files = {"dataset_neurons": random_neuron_file(1), "model_neurons": random_neuron_file(2)}
    files["dataset_neurons"].loss = curve({0.8: 0.02, 0.2: 0.5})
    given = PartInferConfig(max_loss=0.02, dtype="float32", device="cpu")
    loaded = load_model(tiny_checkpoints["llama"], given, **files)
    settings = OtherSettings(loaded, RunFiles(**files))
    settings.use(Setting(0.1))  # as many base neurons
    before = answer(loaded)
    with pytest.raises(PartInferError, match="stores neurons in another order"):
        settings.use(Setting(0.6))
    assert answer(loaded) == before


@pytest.fixture
def by_input(tiny_checkpoints):
    """A model whose layers are stored by input, and others of its kind by the share of bytes that they read."""
    neurons = replace(NEURONS, ladder=made_up_ladder())
    given = {"dtype": "float32", "device": "cpu"}

    def load_share(share: float):
        return load_model(tiny_checkpoints["llama"], PartInferConfig(block_bytes=share, **given), neurons)

    loaded = load_share(0.7)
    return loaded, OtherSettings(loaded, RunFiles(neurons)), load_share


@pytest.mark.parametrize("bound, share", [(0.02, 0.8), (0.06, 0.6)])
def test_layers_by_input_follow_another_bound(by_input, bound, share):
    loaded, settings, load_share = by_input
    assert loaded.run.layer_choices is not None
    other, own = load_share(share), answer(loaded)
    settings.use(Setting(bound))
    loaded.reset_counters()
    assert answer(loaded) == answer(other)
    assert loaded.token_bytes() == other.token_bytes()
    assert loaded.run.predicted_loss == other.run.predicted_loss
    settings.use(Setting())
    assert answer(loaded) == own


def test_layers_by_input_compute_everything_when_dense(by_input, tiny_checkpoints):
    loaded, settings, _ = by_input
    settings.use(Setting(dense=True))
    loaded.reset_counters()
    assert answer(loaded) == answer(load(tiny_checkpoints["llama"], method="dense"))
    assert loaded.bytes_fraction() == 1.0
    assert {bound["of"] for bound in settings.bounds} == {"layers"}
