"""What `auto` means: one decision per setting, each with its reason."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import random_neuron_file
from tests.transformers_patches.made_up_files import made_up_fit, with_statistics
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.plan import machine, resolve
from transformers_patches.plan.decision import Decision
from transformers_patches.plan.resolve import RunFiles, resolve_by_files
from transformers_patches.plan.run import resolve_run

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(model_type="llama", intermediate_size=80, num_hidden_layers=6, dtype=torch.bfloat16)
SPREAD = {"layer_sparsity": '{"1": 0.3, "2": 0.4, "3": 0.4, "4": 0.5}'}


def settings(**options) -> PartInferConfig:
    return PartInferConfig(**{"device": "cpu", "start_num": 1, "end_num": 4} | options)


@pytest.fixture
def with_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: True)


@pytest.mark.parametrize(
    ("options", "fit", "expected"),
    [
        ({}, made_up_fit(**SPREAD), "per_layer"),
        ({"compensation": "refit", "start_num": None}, made_up_fit(**SPREAD), "per_layer"),
        ({}, made_up_fit(), "uniform"),
        ({}, None, "uniform"),
        ({"sparsity": 0.5}, made_up_fit(**SPREAD), "uniform"),
        ({"end_num": 3}, made_up_fit(**SPREAD), "uniform"),
        ({"compensation": "mean"}, made_up_fit(**SPREAD), "uniform"),
        ({"method": "coreinfer"}, made_up_fit(**SPREAD), "uniform"),
        ({"budget": "per_layer"}, None, "per_layer"),
    ],
)
def test_budget(options, fit, expected):
    assert resolve.decide_budget(settings(**options), fit).value == expected


@pytest.mark.parametrize(
    ("options", "fit", "statistics", "expected"),
    [
        ({}, made_up_fit(), True, "refit"),
        ({}, None, True, "mean"),
        ({"loaded_neurons_percent": 1.0}, None, True, "none"),
        ({"loaded_neurons_percent": 1.0, "selection": "core"}, None, True, "mean"),
        ({}, None, False, "none"),
        ({"compensation": "none"}, made_up_fit(), True, "none"),
        ({"method": "coreinfer"}, made_up_fit(), True, "none"),
    ],
)
def test_compensation(options, fit, statistics, expected):
    unfit = None if fit else "there is none"
    assert resolve.decide_compensation(settings(**options), fit, unfit, statistics=statistics).value == expected


def test_a_named_fit_file_that_does_not_fit_is_an_error():
    with pytest.raises(PartInferError, match="fit file here can't be used: wrong layers"):
        resolve.decide_compensation(settings(fit_filepath="here"), None, "wrong layers", statistics=True)


@pytest.mark.parametrize(
    ("options", "informed", "expected"),
    [
        ({}, True, "up"),
        ({}, False, "core"),
        ({"memory_limit": True, "device": "auto"}, True, "blend"),
        ({"method": "coreinfer"}, True, "core"),
        ({"selection": "griffin"}, True, "griffin"),
    ],
)
def test_selection(options, informed, expected):
    assert resolve.decide_selection(settings(**options), informed=informed).value == expected


def test_token_count():
    fit = made_up_fit(selection="up")
    for layer in fit.layers.values():
        layer.threshold = torch.tensor(0.1)
    assert resolve.decide_token_count(settings(selection="up"), fit).value == "average"
    assert resolve.decide_token_count(settings(selection="gate"), fit).value == "exact"
    assert resolve.decide_token_count(settings(selection="up"), None).value == "exact"
    assert resolve.decide_token_count(settings(selection="up", token_count="exact"), fit).value == "exact"


@pytest.mark.parametrize(("compensation", "used"), [("auto", True), ("refit", True), ("mean", False), ("none", False)])
def test_a_fit_file_is_used_for_what_it_was_made_for(compensation, used):
    files = RunFiles(with_statistics(1), None, made_up_fit())
    _, fit = resolve_by_files(settings(compensation=compensation), files, 6)
    assert fit is (files.fit if used else None)


def test_what_the_files_cannot_give_is_an_error():
    with pytest.raises(PartInferError, match="refit needs a fit file made for it, but there is none"):
        resolve_by_files(settings(compensation="refit"), RunFiles(with_statistics(1)), 6)
    with pytest.raises(PartInferError, match="compensation mean needs the statistics"):
        resolve_by_files(settings(compensation="mean"), RunFiles(random_neuron_file(1)), 6)


def test_base_neuron_file():
    dataset, model = random_neuron_file(1), random_neuron_file(2)
    assert RunFiles(dataset, model).base(settings()) is dataset
    assert RunFiles(dataset, model).base(settings(base_neurons_type="model")) is model
    assert RunFiles(None, model).base(settings()) is model
    assert RunFiles(dataset).base(settings(base_neurons_type="model")) is dataset
    assert RunFiles().base(settings()) is None


@pytest.mark.parametrize(("gpu", "expected"), [(True, "cuda"), (False, "cpu")])
def test_device(monkeypatch, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert machine.decide_device(settings(device="auto")).value == expected
    assert machine.decide_device(settings(device="cpu")).value == "cpu"
    if not gpu:
        with pytest.raises(PartInferError, match="memory_limit moves active neurons to a GPU, but there is none"):
            machine.decide_device(settings(device="auto", memory_limit=True))


def test_dtype():
    assert machine.decide_dtype(settings(), CONFIG).value == "bfloat16"
    assert machine.decide_dtype(settings(), SimpleNamespace(dtype=None)).value == "float32"
    assert machine.decide_dtype(settings(dtype="int8"), CONFIG).value == "int8"
    assert machine.types_of("int4") == (torch.bfloat16, kernels.FORMATS["int4"])
    assert machine.types_of("float16") == (torch.float16, None)


def test_head_dtype():
    assert machine.decide_head_dtype(settings(), "int4").value == "int8"
    assert machine.decide_head_dtype(settings(), "float16").value == "float16"
    assert machine.decide_head_dtype(settings(head_dtype="int4"), "int4").value == "int4"
    with pytest.raises(PartInferError, match="head_dtype int8 belongs to quantised weights"):
        machine.decide_head_dtype(settings(head_dtype="int8"), "bfloat16")


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "expected"),
    [
        ("auto", "cpu", "bfloat16", "native"),
        ("auto", "cpu", "int4", "native"),
        ("auto", "cpu", "float32", "torch"),
        ("native", "cpu", "float32", "native"),
        ("torch", "cpu", "bfloat16", "torch"),
        ("triton", "cpu", "bfloat16", "torch"),
        ("native", "cuda", "bfloat16", "torch"),
        ("auto", "cuda", "float32", "triton"),
        ("torch", "cuda", "int4", "torch"),
        ("auto", "mps", "bfloat16", "torch"),
    ],
)
def test_kernels(with_kernels, monkeypatch, asked, device, dtype, expected):
    monkeypatch.setattr(machine.triton, "available", lambda: True)
    assert machine.decide_kernels(settings(kernels=asked), torch.device(device), dtype).value == expected


def test_without_triton_pytorch_decodes_on_gpus(monkeypatch):
    monkeypatch.setattr(machine.triton, "available", lambda: False)
    decision = machine.decide_kernels(settings(), torch.device("cuda"), "bfloat16")
    assert decision.value == "torch"
    assert decision.why.startswith("no Triton kernels")


def test_without_native_kernels_the_reason_is_theirs(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(kernels, "why_not", lambda: "no compiler")
    decision = machine.decide_kernels(settings(), CPU, "bfloat16")
    assert decision == Decision("torch", "no native kernels: no compiler")


@pytest.mark.parametrize(
    ("asked", "native", "head", "expected"),
    [
        ("auto", True, "int8", "on"),
        ("auto", True, "bfloat16", "off"),
        ("on", True, "bfloat16", "on"),
        ("on", True, "int4", "off"),
        ("on", False, "int8", "off"),
        ("off", True, "int8", "off"),
    ],
)
def test_screening(asked, native, head, expected):
    assert machine.decide_screening(settings(screen_head=asked), native=native, head_dtype=head).value == expected


def test_a_resolved_run_has_no_auto_and_says_why(with_kernels):
    run = resolve_run(settings(), CONFIG, RunFiles(with_statistics(1)))
    assert "auto" not in run.settings.to_dict().values()
    auto = {name for name, value in PartInferConfig().to_dict().items() if value == "auto"}
    assert set(run.decisions) == {"block_bytes", *auto}
    assert (run.dtype, run.weight_format, run.native, run.screened) == (torch.bfloat16, None, True, False)
    assert list(run.plan.layers) == [1, 2, 3, 4]
    lines = run.describe().splitlines()
    assert len(lines) == len(run.decisions)
    assert ["compensation", "mean", "the neuron file has statistics"] in [line.split(maxsplit=2) for line in lines]
    again = resolve_run(run.settings, CONFIG, run.files)
    assert again.settings == run.settings
