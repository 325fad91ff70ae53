"""`python -m profiler run`, end to end on tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from profiler.__main__ import main
from transformers_patches.neurons.neuron_file import INPUT_SQUARES, STATISTICS, NeuronFile


def run(model_folder, dataset, output, *more: str) -> int:
    fixed = ["run", "--checkpoint_path", str(model_folder), "--dataset", str(dataset), "--output", str(output)]
    return main([*fixed, "--device", "cpu", "--quiet", *more])


def largest_difference(first: NeuronFile, second: NeuronFile) -> float:
    """Of all statistics, relative to the layer's largest value."""
    return max(
        float((first.statistics[name] - second.statistics[name]).abs().max() / first.statistics[name].abs().max())
        for name in STATISTICS
    )


THREADS = torch.get_num_threads()
SMALL = ("--task_type", "QA", "--max_new_tokens", "5", "--batch_size", "4")


def test_file_holds_ranking_scores_statistics_and_origin(model_folder, questions, tmp_path, capsys):
    assert run(model_folder, questions, tmp_path / "qa.safetensors", *SMALL, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    file = NeuronFile.load(tmp_path / "qa.safetensors")
    assert set(file.statistics) == set(STATISTICS)
    assert set(file.input_squares) == set(INPUT_SQUARES)
    assert torch.equal(file.scores, file.statistics["mean_abs"])
    assert (file.scores.gather(1, file.ranking.long()).diff(dim=1) <= 0).all()
    assert file.metadata["model_name"] == "tiny-llama"
    assert file.metadata["texts"] == summary["texts"] == "21"
    assert [p.name for p in tmp_path.iterdir()] == ["qa.safetensors"]  # no lock, no checkpoint


def test_of_a_large_model_fewer_of_the_built_in_texts_are_taken(model_folder, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("profiler.commands.run.LARGE", 1000)
    monkeypatch.setattr("profiler.commands.run.TEXTS_OF_LARGE", 7)
    short = ("--task_type", "QA", "--max_new_tokens", "0", "--loss_tokens", "0")
    for name, dataset, limit in (("few", "builtin", ()), ("own", questions, ()), ("given", "builtin", ("--limit", "9"))):
        assert run(model_folder, dataset, tmp_path / f"{name}.safetensors", *short, *limit) == 0
    texts = [NeuronFile.load(tmp_path / f"{name}.safetensors").metadata["texts"] for name in ("few", "own", "given")]
    assert texts == ["7", "21", "9"]


@pytest.mark.parametrize("new_tokens", ["0", "5"])
def test_statistics_do_not_depend_on_the_batch_size(model_folder, questions, tmp_path, new_tokens):
    for size in ("1", "4", "21"):
        more = ("--task_type", "QA", "--max_new_tokens", new_tokens, "--batch_size", size)
        assert run(model_folder, questions, tmp_path / f"{size}.safetensors", *more) == 0
    one, four, all_ = (NeuronFile.load(tmp_path / f"{size}.safetensors") for size in ("1", "4", "21"))
    assert one.tokens == four.tokens == all_.tokens
    assert largest_difference(one, four) < 1e-5
    assert largest_difference(one, all_) < 1e-5


def test_ctrl_c_saves_and_resume_gives_the_same_bytes(model_folder, questions, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    more = (*SMALL, "--checkpoint_every", "8")
    assert run(model_folder, questions, whole, *more) == 0
    interrupt_after(monkeypatch, batches=3)  # in the middle of the second window
    assert run(model_folder, questions, broken, *more) == 130
    monkeypatch.undo()
    assert not broken.exists()
    assert run(model_folder, questions, broken, *more) == 1  # neither --resume nor --overwrite
    assert run(model_folder, questions, broken, *more, "--batch_size", "2", "--resume") == 1  # other settings
    assert run(model_folder, questions, broken, *more, "--resume") == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert run(model_folder, questions, broken, *more, "--resume") == 0  # nothing left to do
    assert run(model_folder, questions, broken, *more) == 1  # would lose a finished file
    assert run(model_folder, questions, broken, *more, "--overwrite") == 0


def interrupt_after(monkeypatch, batches: int) -> None:
    """Let the Collector raise KeyboardInterrupt after some batches, with sums of one pending."""
    from profiler.collect import Collector

    observe, done = Collector.observe, []

    def observe_or_interrupt(self, batch):
        tokens = observe(self, batch)
        if len(done) == batches:
            raise KeyboardInterrupt
        done.append(tokens)
        return tokens

    monkeypatch.setattr(Collector, "observe", observe_or_interrupt)


def test_changed_texts_are_noticed_on_resume(model_folder, questions, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(questions.read_text())
    more = (*SMALL, "--checkpoint_every", "8")
    interrupt_after(monkeypatch, batches=3)
    assert run(model_folder, copy, tmp_path / "qa.safetensors", *more) == 130
    monkeypatch.undo()
    copy.write_text(copy.read_text().replace("much 3", "little 3"))
    assert run(model_folder, copy, tmp_path / "qa.safetensors", *more, "--resume") == 1
    assert "texts have changed" in capsys.readouterr().err


def command(model_folder, dataset, output, *more: str) -> list[str]:
    fixed = ["--checkpoint_path", model_folder, "--dataset", dataset, "--output", output, "--device", "cpu"]
    return ["profiler", "run", *map(str, fixed), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_killed_run_resumes_to_the_same_bytes_and_a_second_run_refuses(model_folder, tmp_path, capsys):
    data = tmp_path / "many.jsonl"
    data.write_text("".join(f'{{"question": "Number {i}?"}}\n' for i in range(300)))
    output, checkpoint = tmp_path / "qa.safetensors", tmp_path / "qa.safetensors.checkpoint"
    more = ("--task_type", "QA", "--max_new_tokens", "8", "--batch_size", "4", "--checkpoint_every", "8")
    arguments = command(model_folder, data, output, *more, "--quiet")
    process = subprocess.Popen([sys.executable, "-m", *arguments], env=environment())
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        assert run(model_folder, data, output, *more, "--resume") == 1
        assert "another run is writing" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    torch.set_num_threads(1)  # as in the run that was killed: sums depend on the number of threads
    try:
        assert run(model_folder, data, output, *more, "--resume") == 0
        whole = tmp_path / "whole.safetensors"
        assert run(model_folder, data, whole, *more) == 0
    finally:
        torch.set_num_threads(THREADS)
    assert output.read_bytes() == whole.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"many.jsonl", "qa.safetensors", "whole.safetensors"}


def launch(*arguments: str) -> subprocess.CompletedProcess:
    """Two processes on the CPU; --multi_gpu is what makes accelerate start several, on CPUs too."""
    given = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *given.split(), "--main_process_port", "0", "-m"]
    return subprocess.run([*launcher, *arguments], env=environment(), capture_output=True, text=True)


def test_two_processes_give_the_file_of_one(model_folder, questions, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    more = (*SMALL, "--checkpoint_every", "8")
    assert run(model_folder, questions, one, *more) == 0
    done = launch(*command(model_folder, questions, two, *more))
    assert done.returncode == 0, done.stderr
    first, second = NeuronFile.load(one), NeuronFile.load(two)
    assert second.metadata["processes"] == "2"
    assert (first.tokens, first.metadata["texts"]) == (second.tokens, second.metadata["texts"])
    assert largest_difference(first, second) < 1e-5

    again = launch(*command(model_folder, questions, two, *more, "--resume"))  # nothing left to do, for both of them
    assert again.returncode == 0, again.stderr
    assert "21 texts" in again.stdout


def test_when_one_process_stops_the_other_does_too_and_one_says_why(model_folder, tmp_path):
    def poison(model, tokenizer):
        model.model.embed_tokens.weight[tokenizer("Z")["input_ids"][-1]] = float("nan")

    poisoned_copy(model_folder, tmp_path / "poisoned", poison)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(f'{{"text": "{"Zebra" if i == 7 else "horse"} number {i}"}}\n' for i in range(12)))
    stopped = launch(*command(tmp_path / "poisoned", data, tmp_path / "qa.safetensors", *SMALL))
    assert stopped.returncode == 1
    assert "layer 0, text 7 (from 0), 'Question: Zebra" in stopped.stderr
    assert not (tmp_path / "qa.safetensors").exists()


def poisoned_copy(model_folder, folder, poison) -> None:
    model = LlamaForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with torch.no_grad():
        poison(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_nan_stops_and_names_the_text(model_folder, tmp_path, capsys):
    def poison(model, tokenizer):
        model.model.embed_tokens.weight[tokenizer("Z")["input_ids"][-1]] = float("nan")

    poisoned_copy(model_folder, tmp_path / "poisoned", poison)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(f'{{"text": "{text}"}}\n' for text in ("one", "two", "Zebra", "four")))
    assert run(tmp_path / "poisoned", data, tmp_path / "qa.safetensors", *SMALL) == 1
    message = capsys.readouterr().err
    assert "layer 0, text 2 (from 0), 'Question: Zebra" in message
    assert not (tmp_path / "qa.safetensors").exists()


def test_infinity_stops_and_names_the_layer(model_folder, questions, tmp_path, capsys):
    def poison(model, tokenizer):
        model.model.layers[2].mlp.up_proj.weight[7] = float("inf")

    poisoned_copy(model_folder, tmp_path / "poisoned", poison)
    assert run(tmp_path / "poisoned", questions, tmp_path / "qa.safetensors", *SMALL) == 1
    assert "layer 2, text" in capsys.readouterr().err


def test_own_texts_are_seeded_and_resume(model_folder, tmp_path, monkeypatch):
    more = (
        "--task_type",
        "QA",
        "--max_new_tokens",
        "6",
        "--batch_size",
        "4",
        "--limit",
        "14",
        "--checkpoint_every",
        "4",
    )
    one, again, other = (tmp_path / f"{name}.safetensors" for name in ("one", "again", "other"))
    assert run(model_folder, "self", one, *more) == 0
    interrupt_after(monkeypatch, batches=2)
    assert run(model_folder, "self", again, *more) == 130
    monkeypatch.undo()
    assert run(model_folder, "self", again, *more, "--resume") == 0
    assert again.read_bytes() == one.read_bytes()
    assert run(model_folder, "self", other, *more, "--seed", "1") == 0
    assert largest_difference(NeuronFile.load(one), NeuronFile.load(other)) > 1e-3


def test_wrong_input_is_one_line(model_folder, questions, tmp_path, capsys):
    output = tmp_path / "x.safetensors"
    for dataset, more, expected in (
        ("nowhere.jsonl", ("--task_type", "QA"), "no data set at nowhere.jsonl"),
        (questions, (), "--task_type is needed"),
        (questions, ("--task_type", "Summarize"), "name one with --text_field"),
        (
            questions,
            ("--task_type", "QA", "--text_field", "query"),
            "line 1: there is no field 'query', only question",
        ),
        (questions, ("--task_type", "QA", "--skip", "50"), "there are no texts"),
        (questions, ("--task_type", "QA", "--max_length", "2000"), "positions for 1024"),
        (questions, ("--task_type", "QA", "--chat_template"), "no chat template"),
        (questions, ("--task_type", "text", "--chat_template"), "--chat_template is for prompts"),
        ("self", ("--task_type", "QA"), "needs --limit"),
    ):
        assert run(model_folder, dataset, output, *more) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert expected in lines[-1]
    assert run(tmp_path / "nothing", questions, output, "--task_type", "QA") == 1
    assert "config.json is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        run(model_folder, questions, output, "--task_type", "QA", "--resume", "--overwrite")
    assert exit_.value.code == 2


@pytest.mark.parametrize("name", ["x.json", "x", "folder.safetensors"])
def test_outputs_that_can_not_hold_statistics_are_refused_before_the_run(
    model_folder, questions, tmp_path, name, capsys
):
    (tmp_path / "folder.safetensors").mkdir()
    assert run(model_folder, questions, tmp_path / name, "--task_type", "QA") == 1
    assert "ends in .safetensors" in capsys.readouterr().err


def test_a_folder_that_can_not_be_made_is_one_line(model_folder, questions, capsys):
    assert run(model_folder, questions, questions / "below.safetensors", "--task_type", "QA") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_out_of_memory_says_what_to_lower(model_folder, questions, tmp_path, monkeypatch, capsys):
    def observe(self, batch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("profiler.collect.Collector.observe", observe)
    assert run(model_folder, questions, tmp_path / "qa.safetensors", *SMALL) == 1
    assert "a batch of 4 texts of up to" in capsys.readouterr().err


@pytest.mark.parametrize("elsewhere", ["cpu", "disk"])
def test_a_model_spread_over_devices_gives_the_same_file(model_folder, questions, tmp_path, elsewhere, monkeypatch):
    """As with device_map="auto" where a model is larger than a GPU: some layers' weights are fetched when needed."""
    whole, spread = tmp_path / "whole.safetensors", tmp_path / "spread.safetensors"
    assert run(model_folder, questions, whole, *SMALL) == 0
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": elsewhere,
        "model.layers.2": elsewhere,
    }
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    monkeypatch.setattr("profiler.placement.choose_placement", lambda *arguments: places)
    assert run(model_folder, questions, spread, *SMALL) == 0
    assert spread.read_bytes() == whole.read_bytes()
