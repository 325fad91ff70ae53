"""A share of all decoder layers' bytes: given, chosen by a bound on the loss, or not to be had."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from tests.conftest import FAMILY_CONFIGS, LAYERS, random_neuron_file
from tests.transformers_patches.made_up_files import made_up_ladder
from tests.transformers_patches.neurons.test_loss_curve import curve
from transformers_patches.config import PartInferConfig, check_given, chooses_nothing
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.neuron_files import settings_for
from transformers_patches.plan.resolve import RunFiles
from transformers_patches.plan.run import ResolvedRun, resolve_run

CONFIG = LlamaConfig(**FAMILY_CONFIGS["llama"][1])


def with_ladder() -> NeuronFile:
    neurons = random_neuron_file(1)
    neurons.loss, neurons.ladder = curve(), made_up_ladder()
    return neurons


def resolve(neurons: NeuronFile | None, *, packed: bool = False, **given) -> ResolvedRun:
    settings = PartInferConfig(**{"device": "cpu", "dtype": "float32", **given})
    return resolve_run(settings, CONFIG, RunFiles(neurons), packed=packed)


def test_a_given_share_takes_the_ladders_choices_for_all_layers():
    run = resolve(with_ladder(), block_bytes=0.6)
    assert (run.settings.block_bytes, run.settings.loaded_neurons_percent) == (0.6, 1.0)
    assert list(run.plan.layers) == list(range(LAYERS))
    assert len(run.layer_choices) == LAYERS
    assert run.layer_choices[3].neuron_threshold == 1.0
    assert torch.equal(run.layer_choices[3].inputs["ffn"].norm, made_up_ladder().norm["ffn"][3].float())
    assert run.predicted_loss == pytest.approx(0.06)
    assert run.decisions["block_bytes"].why == "as given"


def test_a_resolved_run_is_resolved_again_to_the_same():
    run = resolve(with_ladder(), block_bytes=0.7)
    assert run.predicted_loss == pytest.approx(0.04)
    assert resolve_run(run.settings, CONFIG, run.files).settings == run.settings


def test_everything_needs_no_ladder():
    assert resolve(random_neuron_file(1), block_bytes=1.0).predicted_loss == 0.0


def test_a_bound_on_the_loss_goes_by_the_curve():
    run = resolve(with_ladder(), max_loss=0.1)
    assert (run.settings.block_bytes, run.layer_choices, run.settings.sparsity) == (None, None, 0.6)
    assert run.predicted_loss == pytest.approx(0.1)
    assert run.decisions["block_bytes"].value == "off"
    assert "FFNs alone" in run.decisions["block_bytes"].why


def test_settings_of_ones_own_are_as_they_were():
    run = resolve(with_ladder(), sparsity=0.4)
    assert (run.settings.block_bytes, run.layer_choices) == (None, None)


@pytest.mark.parametrize(
    ("neurons", "options", "reason"),
    [
        (random_neuron_file(1), {"block_bytes": 0.6}, "needs a byte ladder, but .* has none: make it with"),
        (None, {"block_bytes": 0.6}, "there is no neuron file: make it with python -m profiler loss"),
        (with_ladder(), {"block_bytes": 0.3}, "--block_bytes 0.3 is less than .* give at least 0.4"),
        (with_ladder(), {"block_bytes": 0.6, "packed": True}, "packs hold no weights by input"),
    ],
)
def test_shares_that_cannot_be_had_are_refused_in_one_line(neurons, options, reason):
    with pytest.raises(PartInferError, match=reason) as refused:
        resolve(neurons, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_values_that_are_no_shares_are_refused(share):
    with pytest.raises(PartInferError, match="block_bytes must be a share above 0 and at most 1"):
        PartInferConfig(block_bytes=share)


def test_what_a_share_decides_cannot_be_given_too():
    with pytest.raises(PartInferError, match="of method partinfer, got 0.6 of dense"):
        PartInferConfig(block_bytes=0.6, method="dense")
    with pytest.raises(PartInferError, match="memory_limit moves FFN neurons only"):
        PartInferConfig(block_bytes=0.6, memory_limit=True)
    for name, value in {"sparsity": 0.4, "max_loss": 0.1, "selection": "up", "start_num": 0}.items():
        with pytest.raises(PartInferError, match=f"--block_bytes decides about --{name}: give one of them"):
            check_given({"block_bytes": 0.6, name: value})
    check_given({"block_bytes": 0.6, "device": "cpu", "method": "partinfer"})
    assert not chooses_nothing({"block_bytes": 0.6})


def test_neuron_files_are_looked_up_for_it(tmp_path, monkeypatch):
    from tests.conftest import make_tiny_checkpoint

    monkeypatch.chdir(tmp_path)
    folder = make_tiny_checkpoint(tmp_path / "models" / "own", "llama")
    (tmp_path / "neuron_files" / "own").mkdir(parents=True)
    with_ladder().save(tmp_path / "neuron_files" / "own" / "qa.safetensors")
    given = settings_for(folder, {"block_bytes": 0.6}, "QA")
    assert given.dataset_neurons_filepath.endswith("qa.safetensors")
    assert (given.block_bytes, given.max_loss) == (0.6, None)
    assert settings_for(folder, {}, "QA").max_loss == 0.05


def test_quantised_weights_by_input_need_whole_groups():
    """80 neurons are no whole groups of 32."""
    with pytest.raises(PartInferError, match="groups of 32, which quantised weights by input need"):
        resolve(with_ladder(), block_bytes=0.6, dtype="int8")
