"""Rounding files: what is damaged is refused, what they have not is quantised as always."""

from __future__ import annotations

import pytest
import torch

from transformers_patches import kernels
from transformers_patches.errors import PartInferError
from transformers_patches.files import save_tensors_atomic
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.kernels.formats import INT4
from transformers_patches.neurons.checks import read_tensors
from transformers_patches.weights.model_files import open_weights
from transformers_patches.weights.rounding import RoundedWeights, Rounding
from transformers_patches.weights.source import Source

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def held(rows: int, columns: int, *, scaled: bool = False) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows)
    columns_of = torch.rand(columns, generator=generator) + 0.5 if scaled else None
    return kernels.quantize(torch.randn(rows, columns, generator=generator), INT4, None, columns_of)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "rounding.safetensors"
    Rounding(INT4, "abc", {UP: held(12, 64), DOWN: held(12, 64, scaled=True)}, "2 texts").save(path)
    return path


def test_a_file_comes_back_as_it_was(saved):
    again = Rounding.load(saved)
    assert (again.fingerprint, again.texts, again.weight_format, sorted(again.weights)) == (
        "abc",
        "2 texts",
        INT4,
        [DOWN, UP],
    )
    for one, other in zip(again.weights[DOWN].parts, held(12, 64, scaled=True).parts, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, described: described.update(format="other"), "is no rounding file"),
        (lambda tensors, described: described.update(version="2"), "is no rounding file of version 1"),
        (lambda tensors, described: described.update(dtype="int3"), "a weight format must be one of"),
        (lambda tensors, described: tensors.pop(f"scales.{UP}"), "the scales of .* are missing"),
        (lambda tensors, described: tensors.update({f"data.{UP}": tensors[f"data.{UP}"][:4]}), "don't fit each other"),
        (lambda tensors, described: tensors[f"scales.{UP}"].fill_(torch.nan), "don't fit each other"),
        (lambda tensors, described: tensors.update({f"column_scales.{DOWN}": torch.ones(3)}), "don't fit each other"),
    ],
)
def test_damaged_files_are_refused(saved, change, message):
    tensors, described = read_tensors(saved, "rounding file")
    change(tensors, described)
    save_tensors_atomic(saved, tensors, described)
    with pytest.raises(PartInferError, match=message):
        Rounding.load(saved)


def test_only_what_fits_is_taken(tiny_checkpoints):
    weights = open_weights(tiny_checkpoints["llama"])
    neurons, hidden = weights.shape(UP)
    rounding = Rounding(INT4, "", {UP: held(neurons, hidden), DOWN: held(neurons, hidden, scaled=True)})
    source = RoundedWeights(weights, rounding)
    some = torch.tensor([3, 1])
    out = QuantizedTensor.empty(2, hidden, INT4)
    source.fill([(Source(UP, "rows", some), out)])
    assert torch.equal(out.data, rounding.weights[UP].data[some])
    assert source.taken == 1
    down = QuantizedTensor.empty(2, hidden, INT4, column_scales=True)
    source.fill([(Source(DOWN, "columns", some), down)])
    assert torch.equal(down.column_scales, rounding.weights[DOWN].column_scales)
    assert source.taken == 2
    name = "model.layers.1.mlp.up_proj.weight"  # which the file has not
    ours, expected = (QuantizedTensor.empty(2, hidden, INT4) for _ in range(2))
    source.fill([(Source(name, "rows", some), ours)])
    weights.fill([(Source(name, "rows", some), expected)])
    assert torch.equal(ours.data, expected.data)
    assert source.taken == 2
    floats = torch.empty(2, hidden)
    source.fill([(Source(UP, "rows", some), floats)])  # no quantised weight is asked for
    assert source.taken == 2
