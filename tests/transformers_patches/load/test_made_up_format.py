"""Models and packs in a format that is registered here: nothing but the format itself has to be written."""

from __future__ import annotations

import pytest
import torch

from tests.transformers_patches.made_up_format import MADE_UP
from tests.transformers_patches.model_passes import DATASET, MODEL, logits
from transformers_patches import config, kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import QuantizedTensor, WeightFormat, formats
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.modules.quantized import QuantizedWeight, weight_places
from transformers_patches.weights.pack import Pack
from transformers_patches.weights.source import Source


@pytest.fixture
def made_up(monkeypatch) -> WeightFormat:
    monkeypatch.setitem(formats.FORMATS, MADE_UP.name, MADE_UP)
    monkeypatch.setattr(config, "QUANTIZED_DTYPES", (*config.QUANTIZED_DTYPES, MADE_UP.name))
    monkeypatch.setattr(config, "DTYPES", (*config.DTYPES, MADE_UP.name))
    return MADE_UP


def settings(**options) -> PartInferConfig:
    return PartInferConfig(**({"start_num": 1, "end_num": 4, "device": "cpu"} | options))


def assert_as_floats(loaded: LoadedModel, plain: LoadedModel) -> None:
    """Logits are those of a float model whose quantised weights were replaced by what they stand for."""
    for model in (loaded.model, plain.model):
        model.float()  # what is computed; quantised weights stay as they are
    theirs = dict(weight_places(plain.model))
    replaced = 0
    with torch.no_grad():
        for name, place in weight_places(loaded.model):
            if isinstance(place, QuantizedWeight):
                theirs[name].copy_(kernels.dequantize(place.packed))
                replaced += place.packed.format is MADE_UP
    assert replaced > 10
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", ["torch", "auto"])
@pytest.mark.parametrize("family", ["llama", "smollm2", "opt"])
def test_a_model_loads_in_a_made_up_format(made_up, tiny_checkpoints, family, setting):
    options = {"dtype": "made_up", "kernels": setting}
    loaded = load_model(tiny_checkpoints[family], settings(**options), DATASET, MODEL)
    plain = load_model(tiny_checkpoints[family], settings(dtype="bfloat16", kernels="torch"), DATASET, MODEL)
    assert_as_floats(loaded, plain)
    assert loaded.model.get_output_embeddings().weight.packed.format is kernels.INT8


def test_a_pack_holds_a_made_up_format(made_up, tiny_checkpoints, tmp_path):
    options = settings(dtype="made_up", head_dtype="made_up", kernels="torch")
    write_pack(tiny_checkpoints["llama"], tmp_path / "pack", options, DATASET, MODEL)
    packed = load_model(tmp_path / "pack", settings(kernels="torch"))
    assert packed.settings.dtype == packed.settings.head_dtype == "made_up"
    assert torch.equal(logits(packed), logits(load_model(tiny_checkpoints["llama"], options, DATASET, MODEL)))
    name = "model.layers.0.self_attn.q_proj.weight"
    pack = Pack(tmp_path / "pack")
    for wrong in (torch.empty(pack.shape(name)), QuantizedTensor.empty(*pack.shape(name), kernels.INT4)):
        with pytest.raises(PartInferError, match=f"holds {name} in made_up only"):
            pack.fill([(Source(name), wrong)])


def test_a_pack_of_a_format_that_is_gone_is_refused(monkeypatch, made_up, tiny_checkpoints, tmp_path):
    write_pack(tiny_checkpoints["llama"], tmp_path / "pack", settings(dtype="made_up", kernels="torch"), DATASET)
    monkeypatch.undo()
    for dtype in ("auto", "bfloat16", "int4"):
        with pytest.raises(
            PartInferError, match="can't be used: a weight format must be one of int8, int4, got 'made_up'"
        ):
            load_model(tmp_path / "pack", settings(dtype=dtype))
