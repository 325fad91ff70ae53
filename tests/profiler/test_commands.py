"""merge, rank, random, convert, show and compare by their command lines; the help of all."""

from __future__ import annotations

import json

import pytest
import torch

from profiler.__main__ import COMMANDS, main
from profiler.analysis import concentration, overlap
from profiler.plots import most_concentrated
from profiler.ranking import rank
from transformers_patches.errors import PartInferError
from transformers_patches.neurons.neuron_file import STATISTICS, NeuronFile
from transformers_patches.neurons.random_ranking import random_ranking

LAYERS, SIZE = 3, 20


def neuron_file(seed: int) -> NeuronFile:
    generator = torch.Generator().manual_seed(seed)
    statistics = {name: torch.rand(LAYERS, SIZE, generator=generator) for name in STATISTICS}
    metadata = {"model_name": "tiny", "fingerprint": "f", "tokens": "10", "texts": "2", "task_type": "QA"}
    return rank(statistics, "mean_abs", {**metadata, "dataset": f"data{seed}"})


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"file{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        neuron_file(seed).save(path)
    return paths


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"profiler {command} " in capsys.readouterr().out.partition("examples:")[2]


def test_wrong_usage_is_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["rank", "x.safetensors", "--score", "best", "--output", "y.safetensors"])
    assert exit_.value.code == 2
    assert "invalid choice: 'best'" in capsys.readouterr().err


def test_rank_derives_another_ranking_and_back(files, tmp_path):
    other, back = tmp_path / "other.safetensors", tmp_path / "back.safetensors"
    assert main(["rank", str(files[0]), "--score", "rms_down", "--output", str(other)]) == 0
    file = NeuronFile.load(other)
    assert file.metadata["score"] == "rms_down"
    assert not torch.equal(file.ranking, NeuronFile.load(files[0]).ranking)
    assert main(["rank", str(other), "--score", "mean_abs", "--output", str(back)]) == 0
    assert back.read_bytes() == files[0].read_bytes()


def test_merge_writes_a_group(files, tmp_path):
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", *map(str, files), "--task_type", "model", "--output", str(merged)]) == 0
    assert NeuronFile.load(merged).metadata["datasets"] == "3"


def test_random_is_seeded_and_belongs_to_the_model(model_folder, tmp_path, capsys):
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, seed in zip(paths, "001", strict=True):
        arguments = ["--checkpoint_path", str(model_folder), "--output", str(path)]
        assert main(["random", *arguments, "--seed", seed]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    file = NeuronFile.load(paths[0])
    assert (file.num_layers, file.intermediate_size) == (3, 48)
    assert file.metadata["fingerprint"]
    assert main(["merge", str(paths[0]), str(paths[2]), "--output", str(tmp_path / "m.safetensors")]) == 1
    assert "has no statistics" in capsys.readouterr().err


def test_convert_there_and_back(model_folder, files, tmp_path, capsys):
    legacy, back = tmp_path / "legacy.json", tmp_path / "back.safetensors"
    assert main(["convert", str(files[0]), str(legacy)]) == 0
    assert json.loads(legacy.read_text()) == {"neurons": NeuronFile.load(files[0]).ranking.tolist()}
    assert main(["convert", str(legacy), str(back)]) == 0
    assert torch.equal(NeuronFile.load(back).ranking, NeuronFile.load(files[0]).ranking)
    assert main(["convert", str(legacy), str(back), "--overwrite", "--checkpoint_path", str(model_folder)]) == 1
    assert "3 layers of 20 neurons, but tiny-llama has 3 layers of 48" in capsys.readouterr().err
    assert main(["convert", str(legacy), str(tmp_path / "x.bin")]) == 1
    assert "ends in .json or .safetensors" in capsys.readouterr().err


def test_show_counts_the_mass_in_the_best_neurons(files, capsys):
    file = neuron_file(0)
    assert main(["show", str(files[0]), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    mass = file.statistics["mean_abs"].sort(dim=1, descending=True).values
    assert shown["concentration"]["0.3"] == pytest.approx((mass[:, :6].sum(1) / mass.sum(1)).tolist(), rel=1e-5)
    assert shown["layers"] == LAYERS
    assert main(["show", str(files[0])]) == 0
    text = capsys.readouterr().out
    assert "data0" in text
    assert "top 30 %" in text


def test_show_of_a_ranking_without_statistics_says_so(tmp_path, capsys):
    NeuronFile(neuron_file(0).ranking).save(tmp_path / "legacy.json")
    assert main(["show", str(tmp_path / "legacy.json")]) == 0
    assert "no statistics" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "legacy.json"), "--plot", str(tmp_path / "plot.png")]) == 1


def test_concentration_of_even_and_of_single_neurons():
    even = torch.ones(1, SIZE)
    single = torch.zeros(1, SIZE)
    single[0, 3] = 2.0
    statistics = {"mean_abs": torch.cat([even, single])}
    file = rank(statistics, "mean_abs", {})
    assert concentration(file, (0.1, 0.5)).tolist() == [[pytest.approx(0.1), pytest.approx(0.5)], [1.0, 1.0]]


def test_overlap_counts_common_neurons():
    first = NeuronFile(torch.arange(10).repeat(2, 1).int())
    second = NeuronFile(torch.stack([torch.arange(10), torch.arange(10).flip(0)]).int())
    assert overlap(first, second, 0.3).tolist() == [1.0, 0.0]
    assert overlap(first, second, 0.6).tolist() == [1.0, pytest.approx(2 / 6)]
    with pytest.raises(PartInferError, match="compare files of one model"):
        overlap(first, neuron_file(0), 0.3)


def test_random_rankings_overlap_by_chance():
    first, second = (random_ranking(30, 1500, seed) for seed in (0, 1))
    assert float(overlap(first, second, 0.3).mean()) == pytest.approx(0.3, abs=0.01)


def test_compare_prints_pairs_names_and_chance(files, capsys):
    given = [f"{files[0]}=first", str(files[1]), str(files[2])]
    assert main(["compare", *given, "--top", "0.5", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["files"] == ["first", "file1", "file2"]
    assert compared["chance"] == 0.5
    assert compared["overlap"][0][0] == [1.0] * LAYERS
    assert compared["overlap"][0][1] == overlap(neuron_file(0), neuron_file(1), 0.5).tolist()
    assert main(["compare", *given]) == 0
    assert "first / file1" in capsys.readouterr().out
    assert main(["compare", str(files[0])]) == 1
    assert main(["compare", *given, "--top", "30"]) == 1


def test_compared_files_may_have_an_equals_sign_in_their_names(tmp_path, capsys):
    path = tmp_path / "top=0.3.safetensors"
    neuron_file(0).save(path)
    assert main(["compare", str(path), f"{path}=again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["top=0.3", "again"]


def test_layers_that_stand_out_are_labelled():
    even = torch.linspace(0.05, 1, 20).repeat(9, 1)
    even[4] = torch.linspace(0.8, 1, 20)
    assert most_concentrated(even) == [4]
    assert most_concentrated(even[:1]) == []


def test_outputs_of_another_kind_are_refused(files, tmp_path, capsys):
    assert main(["show", str(files[0]), "--plot", str(tmp_path / "curves.xyz")]) == 1
    assert "ends in .png, .pdf, .svg" in capsys.readouterr().err
    for arguments in (["merge"], ["rank", "--score", "rms"]):
        assert main([*arguments, str(files[0]), "--output", str(tmp_path / "x.json")]) == 1
        assert "ends in .safetensors" in capsys.readouterr().err


def test_a_file_that_can_not_be_written_is_one_line(files, capsys):
    assert main(["rank", str(files[0]), "--score", "rms", "--output", f"{files[1]}/x.safetensors"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(files[1]) in line


def test_plots_are_pictures(files, tmp_path):
    heat, curves = tmp_path / "heat.png", tmp_path / "curves.png"
    assert main(["compare", *map(str, files), "--plot", str(heat)]) == 0
    assert main(["show", str(files[0]), "--plot", str(curves)]) == 0
    for path in (heat, curves):
        assert path.read_bytes().startswith(b"\x89PNG")
