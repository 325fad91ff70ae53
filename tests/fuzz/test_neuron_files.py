"""Damaged and hostile neuron files and fit files: each is read, or refused in one line that names what is wrong."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from transformers import LlamaConfig

from tests.conftest import FAMILY_CONFIGS, INTERMEDIATE, LAYERS, random_neuron_file
from tests.fuzz.mutations import READ, REFUSED, VALUES, changed_bytes, changed_json, outcome
from tests.transformers_patches.made_up_files import (
    made_up_curve,
    made_up_fit,
    made_up_ladder,
    with_input_squares,
    with_statistics,
)
from transformers_patches.neurons.byte_ladder import ByteLadder
from transformers_patches.neurons.fit_file import FitFile
from transformers_patches.neurons.neuron_file import NeuronFile

CONFIG = LlamaConfig(**FAMILY_CONFIGS["llama"][1])
TYPES = [torch.float16, torch.float64, torch.int64, torch.uint16, torch.bool, torch.float8_e4m3fn, torch.complex64]


def use_neurons(path: Path) -> None:
    file = NeuronFile.load(path)
    file.check_fits(CONFIG, "0" * 16, "tiny-llama")
    assert file.tokens >= 0
    if file.loss is not None:
        use_curve(file)
    assert not file.has_spread or file.spread().isfinite().all()
    for values in (*file.statistics.values(), *file.input_squares.values()):
        assert values.isfinite().all()
    if file.ladder is not None:
        use_ladder(file.ladder)


def use_ladder(ladder: ByteLadder) -> None:
    assert 0 < ladder.bytes_for(0.05) <= 1
    for share in (0.3, 0.5, 0.7, 0.95, 1.0):
        assert ladder.predict(share) is None or ladder.predict(share) >= 0
        for number in range(LAYERS):
            choice = ladder.layer(share, number)
            thresholds = [one.threshold for one in choice.inputs.values()]
            assert all(map(math.isfinite, [*thresholds, choice.neuron_threshold, choice.down_threshold]))
            assert 0 <= choice.neurons <= 1
            assert all(one.mean.isfinite().all() for one in choice.inputs.values())


def use_curve(file: NeuronFile) -> None:
    curve = file.loss
    for selection in ("up", "core", "griffin"):
        for loaded, sparsity in ((1.0, 1.0), (1.0, 0.55), (0.7, 0.4), (0.7, 0.7), (0.5, 0.1)):
            for layers in ("all", "default"):
                loss = curve.predict(selection, layers, loaded, sparsity)
                assert loss is None or 0 <= loss < float("inf")
    for bound in (0.0, 0.05, 1.0, 1e9):
        sparsity = curve.sparsity_for(bound)
        assert 0 < sparsity <= 1
        thresholds = curve.thresholds_for(sparsity)
        assert thresholds is None or (thresholds.isfinite().all() and len(thresholds) == file.num_layers)
    assert curve.gate_size is None or curve.gate_size[0][:1].float().isfinite().all()


def use_fit(path: Path) -> None:
    file = FitFile.load(path)
    file.check_fits(CONFIG, "0" * 16, "tiny-llama")
    assert 0 <= file.sparsity <= 1
    assert 0 <= file.loaded_neurons_percent <= 1
    assert all(0 <= share <= 1 for share in file.layer_sparsity.values())
    file.has_thresholds("up", 0.4)
    for layer in file.layers.values():
        assert layer.refitted(torch.zeros(len(layer.neurons), CONFIG.hidden_size)).isfinite().all()


def neurons_content() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    file = with_statistics(1)
    file.input_squares = with_input_squares(2).input_squares
    tensors = {"ranking": file.ranking, "scores": file.statistics["mean_abs"].clone()}
    tensors |= {f"statistics.{name}": values for name, values in file.statistics.items()}
    tensors |= {f"input_squares.{name}": values for name, values in file.input_squares.items()}
    ladder, loss = made_up_ladder(), made_up_curve()
    tensors |= {f"ladder.{name}": values for name, values in ladder.tensors().items()}
    tensors |= {f"loss.{name}": values for name, values in loss.tensors().items()}
    named = {
        "ladder_rungs": ladder.described(),
        "loss_points": loss.described(),
        "tokens": "100",
        "texts": "7",
        "datasets": "1",
        "model_name": "tiny-llama",
    }
    return tensors, {**named, "format": "partinfer-neurons", "version": "1"}


def fit_content() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    file = made_up_fit(layer_sparsity=json.dumps(dict.fromkeys(range(1, 5), 0.4)), selection="up")
    named = {"intermediate_size": str(INTERMEDIATE), "format": "partinfer-fit", "version": "1"}
    return file.tensors(), file.metadata | named


def changed_content(tensors: dict, metadata: dict, source: random.Random) -> bytes:
    """A well-formed safetensors file that says or holds something else."""
    original = metadata
    tensors, metadata = {name: values.clone() for name, values in tensors.items()}, dict(metadata)
    for _ in range(source.choice((1, 1, 2))):
        if source.random() < 0.25 and "loss_points" in original:
            metadata["loss_points"] = changed_json(json.loads(original["loss_points"]), source).replace("\\ud800", "?")
            continue
        if source.random() < 0.4:
            key = source.choice(list(metadata))
            metadata[key] = source.choice(
                [*map(str, VALUES), "9" * 9000, "[" * 100_000, "²", "1e999", "-0", '{"1": "x"}']
            )
            metadata[key] = metadata[key].replace("\ud800", "?")
            if source.random() < 0.2:
                del metadata[key]
            continue
        name = source.choice(list(tensors))
        values = tensors.pop(name)
        kind = source.choice(("remove", "rename", "type", "shape", "value", "value"))
        if kind == "rename":
            other = (
                "layers.²",
                "layers.1.neurons.x",
                "layers",
                "layers.99999999999.down",
                "statistics.",
                name.replace("1", "9"),
            )
            tensors[source.choice((*other, name + ".x"))] = values
        elif kind == "type":
            tensors[name] = values.to(source.choice(TYPES))
        elif kind == "shape":
            tensors[name] = source.choice(
                (values[:1], values[:0], values[None], values.reshape(-1), values[..., :3])
            ).clone()
        elif kind == "value":
            number = source.choice((-1, 0, 2**31 - 1, float("nan"), float("inf"), -1e38))
            fits = values.is_floating_point() or number == number and abs(number) < 2**31
            if fits and values.numel():
                values.view(-1)[source.randrange(values.numel())] = number
            tensors[name] = values
    return save(tensors, metadata=metadata)


def write_neurons(folder: Path, number: int, source: random.Random) -> Path:
    if source.random() < 0.3:
        path = folder / f"{number}.json"
        legacy = {"neurons": random_neuron_file(1, LAYERS, INTERMEDIATE).ranking.tolist()}
        if source.random() < 0.5:
            data = json.dumps(legacy).encode()
            path.write_bytes(changed_bytes(data, len(data), source))
        else:
            path.write_text(changed_json(legacy, source))
        return path
    return _write(folder / f"{number}.safetensors", neurons_content(), source)


def write_fit(folder: Path, number: int, source: random.Random) -> Path:
    return _write(folder / f"{number}.fit.safetensors", fit_content(), source)


def _write(path: Path, content: tuple[dict, dict], source: random.Random) -> Path:
    if source.random() < 0.5:
        data = save(content[0], metadata=content[1])
        path.write_bytes(changed_bytes(data, 8 + int.from_bytes(data[:8], "little"), source))
    else:
        path.write_bytes(changed_content(*content, source))
    return path


def campaign(folder: Path, kind: str, seed: int, count: int) -> Counter:
    source = random.Random(f"{kind} {seed}")
    write, use = {"neurons": (write_neurons, use_neurons), "fit": (write_fit, use_fit)}[kind]
    seen = Counter()
    for number in range(count):
        path = write(folder, number, source)
        seen[outcome(use, path)] += 1
        path.unlink()
    return seen


@pytest.mark.parametrize("kind", ["neurons", "fit"])
def test_files_are_read_or_refused(kind, tmp_path):
    seen = campaign(tmp_path, kind, 0, 300)
    assert set(seen) == {READ, REFUSED}, seen
    assert min(seen.values()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
@pytest.mark.parametrize("kind", ["neurons", "fit"])
def test_many_files_are_read_or_refused(kind, seed, tmp_path):
    seen = campaign(tmp_path, kind, seed, 1000)
    assert set(seen) == {READ, REFUSED}, seen
