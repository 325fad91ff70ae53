"""Where a model is put, and when it is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from profiler.placement import AUTO, Estimate, checkpoint_fingerprint, choose_placement, estimate_memory
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.fingerprint import fingerprint_of_model

GIB = 2**30
NEED = Estimate(weights=10 * GIB, batch=2 * GIB)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "gpus", "cpu", "place"),
    [
        (CPU, [], 13 * GIB, "cpu"),
        (GPU, [13 * GIB, 13 * GIB], 0, "cuda:0"),
        (torch.device("cuda:1"), [0, 13 * GIB], 0, "cuda:1"),
        (GPU, [7 * GIB, 7 * GIB], 0, AUTO),
        (GPU, [7 * GIB], 7 * GIB, AUTO),
    ],
)
def test_the_first_place_that_fits(device, gpus, cpu, place):
    assert choose_placement(NEED, device, gpus, cpu) == place


@pytest.mark.parametrize(("device", "gpus", "cpu"), [(CPU, [99 * GIB], 11 * GIB), (GPU, [5 * GIB], 6 * GIB)])
def test_what_fits_nowhere_is_refused_with_the_estimate(device, gpus, cpu):
    with pytest.raises(PartInferError, match="needs about 12.0 GiB .weights 10.0 GiB.*lower --batch_size"):
        choose_placement(NEED, device, gpus, cpu)


def test_several_processes_need_their_share_each():
    assert choose_placement(NEED, CPU, [], 25 * GIB, processes=2) == "cpu"
    with pytest.raises(PartInferError, match="in each of 2 processes, but 23.0 GiB of memory is free: use fewer"):
        choose_placement(NEED, CPU, [], 23 * GIB, processes=2)
    with pytest.raises(PartInferError, match="7.0 GiB on GPU 0 is free: use fewer processes"):
        choose_placement(NEED, GPU, [7 * GIB, 7 * GIB], 99 * GIB, processes=2)  # one process could spread it


def test_estimate_counts_weights_exactly_and_needs_no_memory_for_it():
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    estimate = estimate_memory(config, torch.bfloat16, batch_size=8, tokens=512)
    parameters = 2 * 32000 * 8192 + 80 * (4 * 8192**2 + 3 * 8192 * 28672 + 2 * 8192) + 8192
    assert estimate.weights == 2 * parameters
    assert estimate_memory(config, torch.bfloat16, 16, 512).batch > estimate.batch > 0


def test_a_model_that_can_not_fit_is_refused_before_loading(model_folder, tmp_path, monkeypatch, capsys):
    from profiler import placement
    from profiler.__main__ import main

    monkeypatch.setattr(placement, "free_memory", lambda: 1000)
    monkeypatch.setattr(placement.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    output = tmp_path / "x.safetensors"
    arguments = ["--checkpoint_path", str(model_folder), "--device", "cpu", "--output", str(output)]
    assert main(["run", *arguments, "--dataset", "self", "--limit", "1"]) == 1
    assert "profiling needs about" in capsys.readouterr().err


def test_fingerprint_of_a_folder_is_that_of_the_model(checkpoint):
    from transformers import AutoModelForCausalLM

    config, ours = checkpoint_fingerprint(checkpoint)
    assert ours == fingerprint_of_model(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert config.model_type == AutoConfig.from_pretrained(checkpoint).model_type
