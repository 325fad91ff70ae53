"""What profiler commands write: whole or not there, replaced only when asked to, one writer at a time, killed or not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from profiler.__main__ import main
from tests.conftest import fill, random_neuron_file
from tests.killed import hidden, run_killed
from transformers_patches.locks import exclusive
from transformers_patches.neurons.neuron_file import STATISTICS, NeuronFile

SMALL = ("--task_type", "QA", "--max_new_tokens", "5", "--batch_size", "4", "--device", "cpu", "--quiet")


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "file.safetensors"
    neurons = random_neuron_file(3, 3, 48)
    neurons.statistics = {name: torch.rand(3, 48) for name in STATISTICS}
    neurons.save(path)
    return path


def made_by(command: str, file: Path, output: Path, model_folder: Path) -> list[str]:
    """Arguments of a command that is done in a moment."""
    return {
        "merge": ["merge", str(file), "--output", str(output)],
        "rank": ["rank", str(file), "--score", "rms", "--output", str(output)],
        "random": ["random", "--checkpoint_path", str(model_folder), "--output", str(output)],
        "convert": ["convert", str(file), str(output)],
    }[command]


QUICK = pytest.mark.parametrize("command", ["merge", "rank", "random", "convert"])


@QUICK
def test_an_output_is_replaced_only_with_overwrite(command, file, tmp_path, model_folder, capsys):
    output = tmp_path / "out.safetensors"
    arguments = made_by(command, file, output, model_folder)
    output.write_text("mine")
    assert main(arguments) == 1
    assert f"{output} already exists: replace it with --overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert NeuronFile.load(output).num_layers == 3
    assert hidden(tmp_path) == []


@QUICK
def test_a_device_is_no_output(command, file, tmp_path, model_folder, capsys):
    output = tmp_path / "out.safetensors"
    output.symlink_to("/dev/null")
    assert main([*made_by(command, file, output, model_folder), "--overwrite"]) == 1
    assert f"{output} is a device: give the path of a file" in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()


@QUICK
def test_an_output_that_another_run_writes(command, file, tmp_path, model_folder, capsys):
    output = tmp_path / "out.safetensors"
    with exclusive(output):
        assert main(made_by(command, file, output, model_folder)) == 1
    assert f"another run is writing {output}" in capsys.readouterr().err
    assert not output.exists()


def test_rank_into_the_same_file(file):
    arguments = ["rank", str(file), "--score", "rms", "--output", str(file)]
    before = file.read_bytes()
    assert main(arguments) == 1
    assert file.read_bytes() == before
    assert main([*arguments, "--overwrite"]) == 0
    assert NeuronFile.load(file).metadata["score"] == "rms"
    assert NeuronFile.load(file).statistics.keys() == set(STATISTICS)


def test_a_full_disk(file, small_disk, capsys):
    output = small_disk / "out.safetensors"
    output.write_text("mine")
    fill(small_disk)
    assert main(["merge", str(file), "--output", str(output), "--overwrite"]) == 1
    assert capsys.readouterr().err == f"error: {output}: No space left on device\n"
    assert output.read_text() == "mine"
    assert sorted(os.listdir(small_disk)) == ["filler", "out.safetensors"]


@pytest.mark.parametrize("command", ["run", "fit"])
def test_devices_are_refused_before_the_model_is_loaded(command, model_folder, questions, file, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    output.symlink_to("/dev/null")
    arguments = [command, "--checkpoint_path", str(model_folder), "--dataset", str(questions), *SMALL]
    arguments += ["--neurons", str(file)] if command == "fit" else []
    assert main([*arguments, "--output", str(output), "--overwrite"]) == 1
    assert f"{output} is a device" in capsys.readouterr().err


def test_run_and_fit_that_are_killed_go_on_and_leave_nothing(model_folder, questions, tmp_path):
    neurons, fit = tmp_path / "qa.safetensors", tmp_path / "qa.fit.safetensors"
    common = ["--checkpoint_path", str(model_folder), "--dataset", str(questions), *SMALL]
    commands = {
        neurons: ["run", *common, "--checkpoint_every", "8", "--output", str(neurons)],
        fit: ["fit", *common, "--neurons", str(neurons), "--start_num", "1", "--end_num", "2"],
    }
    for output, arguments in commands.items():
        whole = [*arguments, "--output", str(tmp_path / "whole")] if output == fit else None
        nth = 2  # the first rename is that of a checkpoint
        run_killed(f"from profiler.__main__ import main; main({arguments!r})", nth)
        assert not output.exists()
        left = hidden(tmp_path)
        assert any(name.endswith(".partinfer-partial") for name in left), left
        assert main([*arguments, "--resume"]) == 0
        assert hidden(tmp_path) == []
        made = output.read_bytes()
        assert main([*arguments, "--resume"]) == 0, "there is nothing left to do, which is no failure"
        assert output.read_bytes() == made
        assert main(whole or [*arguments, "--overwrite"]) == 0
        assert (tmp_path / "whole" if whole else output).read_bytes() == made
    assert sorted(os.listdir(tmp_path)) == ["qa.fit.safetensors", "qa.safetensors", "whole"]
