"""Whether Triton is there, and who computes what with it."""

from __future__ import annotations

import sys

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.kernels import operations, triton

from ..helpers import active, error, quantized_ffn, weights


def test_triton_is_there():
    if not triton.available():
        pytest.skip("Triton is not installed, so none of its kernels is tested")
    assert triton.why_not() == ""


@pytest.mark.parametrize(
    ("missing", "why"),
    [("find_spec", "Triton is not installed"), ("shutil", "Triton needs a C compiler (gcc or clang)")],
)
def test_without_triton_or_a_compiler_pytorch_computes(monkeypatch, missing, why):
    triton.why_not.cache_clear()
    monkeypatch.setattr(triton, "find_spec", lambda name: name)
    if missing == "find_spec":
        monkeypatch.setattr(triton, "find_spec", lambda name: None)
    monkeypatch.setattr(triton.shutil, "which", lambda name: None)
    try:
        assert not triton.computes_on(torch.device("cuda"))
        assert triton.why_not() == why
    finally:
        triton.why_not.cache_clear()


def test_tensors_on_the_cpu_do_not_load_the_kernels(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers_patches.kernels.triton.operations", raising=False)
    kernels.ffn(torch.randn(1, 32), active(weights(3, 9, 32), 9))
    assert "transformers_patches.kernels.triton.operations" not in sys.modules


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """Names of the Triton operations that are called, as if the tensors of these tests were on a GPU."""
    if not triton.available() or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from transformers_patches.kernels.triton import operations as gpu

    names = []
    monkeypatch.setattr(triton, "computes_on", lambda device: True)
    for name in ("ffn", "linear", "weighted_rows", "by_input"):
        original = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *a, _name=name, _call=original: names.append(_name) or _call(*a))
    return names


def test_on_a_gpu_the_operations_that_decode_are_triton_s(called):
    x, parts, ones = torch.randn(1, 32), quantized_ffn(weights(3, 9, 32), 8), torch.ones(9)
    y, computed = kernels.ffn(x, active(parts, 9))
    assert computed.tolist() == [9]
    assert y.shape == (1, 32)
    kernels.linear(x, parts[0])
    kernels.weighted_rows(x[:, :9], parts[2])
    kernels.by_input(x[:, :9], kernels.ByInput(parts[2], ones, ones, torch.zeros(32), 0.5))
    assert called == ["ffn", "linear", "weighted_rows", "by_input"]


def test_on_a_gpu_pytorch_multiplies_floats(called):
    x, (weight,) = torch.randn(2, 32), weights(1, 9, 32)
    assert error(kernels.linear(x, weight), x.double() @ weight.double().T) < 1e-6
    assert error(kernels.weighted_rows(x[:, :9], weight), x[:, :9].double() @ weight.double()) < 1e-6
    assert called == []


def test_on_a_gpu_pytorch_computes_activations_without_a_name(called):
    x, layer = torch.randn(1, 32), active(weights(3, 9, 32), 9, activation=torch.tanh)
    assert kernels.ffn(x, layer)[1].tolist() == [9]
    assert called == []
    assert not operations._gpu_reads(x.to("meta"), layer.projections.weight(0))
