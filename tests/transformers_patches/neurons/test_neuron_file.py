"""Neuron files: both formats, every kind of damage, and files of another model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from transformers_patches.errors import PartInferError
from transformers_patches.neurons.neuron_file import FORMAT, STATISTICS, VERSION, NeuronFile, ranking_from_scores

SAMPLES = Path(__file__).parents[4] / "shared" / "neuron_files"
ROWS = [[2, 0, 1, 3], [3, 1, 0, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    "name, layers, size",
    [
        ("llama3-3b-model_neurons.json", 28, 8192),
        ("llama3-3b-qa.json", 28, 8192),
        ("llama3-3b-random_neurons.json", 28, 8192),
        ("opt-6.7b-translate.json", 32, 16384),
    ],
)
def test_files_of_the_original_load(name, layers, size):
    if not (SAMPLES / name).is_file():
        pytest.skip(f"the sample {name} is not there")
    neurons = NeuronFile.load(SAMPLES / name)
    assert neurons.ranking.tolist() == json.loads((SAMPLES / name).read_text())["neurons"]
    assert (neurons.num_layers, neurons.intermediate_size) == (layers, size)
    assert (neurons.scores, neurons.statistics, neurons.metadata) == (None, {}, {})


@pytest.mark.parametrize("name", ["llama3-3b-qa.json", "opt-6.7b-translate.json"])
def test_damaged_files_of_the_original_do_not_load(name, tmp_path):
    if not (SAMPLES / name).is_file():
        pytest.skip(f"the sample {name} is not there")
    text = (SAMPLES / name).read_text()
    (tmp_path / name).write_text(text[: len(text) // 2])
    with pytest.raises(PartInferError, match="not valid JSON"):
        NeuronFile.load(tmp_path / name)
    rows = json.loads(text)["neurons"]
    rows[5][10] = rows[5][20]
    (tmp_path / name).write_text(json.dumps({"neurons": rows}))
    with pytest.raises(PartInferError, match=f"layer 5 is not a permutation: neuron {rows[5][20]} is there 2 times"):
        NeuronFile.load(tmp_path / name)


def changed(layer: int, place: int, value) -> str:
    rows = [list(row) for row in ROWS]
    rows[layer][place] = value
    return json.dumps({"neurons": rows})


@pytest.mark.parametrize(
    "text, message",
    [
        (changed(1, 0, 2), "layer 1 is not a permutation: neuron 2 is there 2 times, neuron 3 is missing"),
        (changed(2, 3, -1), "layer 2 has neuron -1, expected 0 to 3"),
        (changed(0, 3, 4), "layer 0 has neuron 4, expected 0 to 3"),
        (changed(0, 0, 2**40), f"layer 0 has neuron {2**40}, expected 0 to 3"),
        (changed(1, 2, True), "layer 1 has True, expected whole numbers 0 to 3"),
        (changed(1, 2, 0.0), "layer 1 has 0.0, expected whole numbers 0 to 3"),
        (changed(1, 2, None), "layer 1 has None, expected whole numbers 0 to 3"),
        (changed(1, 2, "0"), "layer 1 has '0', expected whole numbers 0 to 3"),
        (changed(1, 2, [0]), r"layer 1 has \[0\], expected whole numbers 0 to 3"),
        (json.dumps({"neurons": [ROWS[0], ROWS[1][:3]]}), "layer 1 has 3 neurons, other layers have 4"),
        (json.dumps({"neurons": [ROWS[0], []]}), "layer 1 has 0 neurons, other layers have 4"),
        (json.dumps({"neurons": ROWS})[:-9], "not valid JSON"),
        ("", "not valid JSON"),
        ("\x00\x01", "not valid JSON"),
        ("{}", 'expected {"neurons": '),
        ("[]", 'expected {"neurons": '),
        ('{"neurons": []}', 'expected {"neurons": '),
        ('{"neurons": [1, 2]}', 'expected {"neurons": '),
        ('{"neurons": [[], []]}', "the layers are empty"),
    ],
)
def test_damaged_legacy_files_say_what_is_wrong(text, message, tmp_path):
    path = tmp_path / "neurons.json"
    path.write_text(text)
    with pytest.raises(PartInferError, match=message) as raised:
        NeuronFile.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_legacy_file_that_is_not_text_is_an_error(tmp_path):
    (tmp_path / "neurons.json").write_bytes(b"\xff\xfe\x80\x00")
    with pytest.raises(PartInferError, match="not valid JSON"):
        NeuronFile.load(tmp_path / "neurons.json")


@pytest.mark.parametrize("name", ["none.json", "none.safetensors", "."])
def test_a_missing_file_names_the_command_that_makes_one(name, tmp_path):
    with pytest.raises(PartInferError, match="no neuron file at .*: make one with python -m profiler run"):
        NeuronFile.load(tmp_path / name)


def full_neuron_file() -> NeuronFile:
    torch.manual_seed(0)
    scores = torch.rand(3, 50)
    statistics = {name: torch.randn(3, 50) for name in STATISTICS}
    metadata = {"model_name": "tiny", "fingerprint": "0123456789abcdef", "tokens": "77", "dataset": "ein Täxt"}
    squares = {"ffn": torch.rand(3, 8), "head": torch.rand(1, 8)}
    return NeuronFile(ranking_from_scores(scores), scores, statistics, metadata, input_squares=squares)


def test_the_projects_format_keeps_everything(tmp_path):
    neurons = full_neuron_file()
    neurons.save(tmp_path / "folder" / "neurons.safetensors")
    again = NeuronFile.load(tmp_path / "folder" / "neurons.safetensors")
    assert torch.equal(again.ranking, neurons.ranking)
    assert torch.equal(again.scores, neurons.scores)
    assert again.statistics.keys() == neurons.statistics.keys()
    assert all(torch.equal(again.statistics[name], values) for name, values in neurons.statistics.items())
    assert again.input_squares.keys() == neurons.input_squares.keys()
    assert all(torch.equal(again.input_squares[name], values) for name, values in neurons.input_squares.items())
    assert again.metadata == neurons.metadata
    assert again.tokens == 77
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["neurons.safetensors"]


@pytest.mark.parametrize(
    "squares",
    [{"ffn": torch.rand(2, 8)}, {"head": torch.rand(8)}, {"head": torch.rand(3, 8)}, {"ffn": -torch.ones(3, 8)}],
    ids=["layers", "dimensions", "head", "negative"],
)
def test_damaged_squares_of_inputs_are_refused(squares):
    neurons = full_neuron_file()
    with pytest.raises(PartInferError, match="input_squares.* the file is damaged, make it again"):
        NeuronFile(neurons.ranking, input_squares=squares)


def test_the_legacy_format_keeps_the_ranking(tmp_path):
    neurons = full_neuron_file()
    neurons.save(tmp_path / "neurons.json")
    again = NeuronFile.load(tmp_path / "neurons.json")
    assert torch.equal(again.ranking, neurons.ranking)
    assert json.loads((tmp_path / "neurons.json").read_text()) == {"neurons": neurons.ranking.tolist()}


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    neurons = full_neuron_file()
    neurons.save(tmp_path / "neurons.safetensors")
    broken = NeuronFile(neurons.ranking, metadata={"tokens": 77})  # safetensors metadata must be strings
    with pytest.raises(Exception):  # noqa: B017
        broken.save(tmp_path / "neurons.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["neurons.safetensors"]
    assert torch.equal(NeuronFile.load(tmp_path / "neurons.safetensors").scores, neurons.scores)


GOOD = torch.tensor(ROWS, dtype=torch.int32)
DOUBLED = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 3]], dtype=torch.int32)
LABEL = {"format": FORMAT, "version": VERSION}


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({"ranking": DOUBLED}, LABEL, "layer 1 is not a permutation: neuron 1 is there 2 times, neuron 2 is missing"),
        ({"ranking": GOOD - 1}, LABEL, "layer 0 has neuron -1, expected 0 to 3"),
        ({"ranking": GOOD.bool()}, LABEL, r"expected whole numbers .*, got torch.bool \[3, 4\]"),
        ({"ranking": GOOD.float()}, LABEL, r"expected whole numbers .*, got torch.float32 \[3, 4\]"),
        ({"ranking": GOOD[0]}, LABEL, r"expected whole numbers of shape \[layers, neurons\], got torch.int32 \[4\]"),
        ({"ranking": GOOD, "scores": torch.zeros(3, 5)}, LABEL, r"scores has shape \[3, 5\], the ranking \[3, 4\]"),
        ({"ranking": GOOD, "statistics.mean": torch.zeros(4)}, LABEL, r"mean has shape \[4\], the ranking \[3, 4\]"),
        ({"scores": torch.zeros(3, 4)}, LABEL, "not a neuron file"),
        ({"ranking": GOOD}, {"format": "pt"}, "not a neuron file"),
        ({"ranking": GOOD}, None, "not a neuron file"),
        ({"ranking": GOOD}, {**LABEL, "version": "99"}, "has format version '99', this program reads '1'"),
    ],
)
def test_wrong_safetensors_files_say_what_is_wrong(tensors, metadata, message, tmp_path):
    path = tmp_path / "neurons.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(PartInferError, match=message) as raised:
        NeuronFile.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_truncated_safetensors_files_are_an_error(kept, tmp_path):
    path = tmp_path / "neurons.safetensors"
    full_neuron_file().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PartInferError, match="not a readable neuron file"):
        NeuronFile.load(path)


def test_a_legacy_file_with_the_wrong_ending_is_an_error(tmp_path):
    (tmp_path / "neurons.safetensors").write_text(json.dumps({"neurons": ROWS}))
    with pytest.raises(PartInferError, match="not a readable neuron file"):
        NeuronFile.load(tmp_path / "neurons.safetensors")


MODEL = SimpleNamespace(model_type="llama", num_hidden_layers=3, intermediate_size=4)


@pytest.mark.parametrize("layers, size", [(2, 4), (3, 5)])
def test_another_shape_names_both_sides(layers, size):
    neurons = NeuronFile(torch.stack([torch.arange(size)] * layers), source="qa.json")
    with pytest.raises(PartInferError) as raised:
        neurons.check_fits(MODEL, None, "my-model")
    assert f"qa.json ranks {layers} layers of {size} neurons" in str(raised.value)
    assert "my-model has 3 layers of 4" in str(raised.value)


def test_another_fingerprint_names_both_sides():
    neurons = NeuronFile(GOOD, metadata={"fingerprint": "aaaa", "model_name": "theirs"}, source="qa.safetensors")
    with pytest.raises(PartInferError) as raised:
        neurons.check_fits(MODEL, "bbbb", "ours")
    message = str(raised.value)
    assert all(part in message for part in ("qa.safetensors", "theirs", "aaaa", "ours", "bbbb"))
    neurons.check_fits(MODEL, "aaaa", "ours")


def test_a_file_without_fingerprint_is_checked_by_shape_only():
    NeuronFile(GOOD).check_fits(MODEL, "bbbb", "ours")


def test_rankings_from_scores_are_descending_and_stable():
    scores = torch.tensor([[0.5, 2.0, 0.5, -1.0, 2.0]])
    assert ranking_from_scores(scores).tolist() == [[1, 4, 0, 2, 3]]
