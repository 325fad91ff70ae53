"""partinfer.py as a user runs it: output streams, JSON, exit codes, messages."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

import partinfer
from tests.conftest import ROOT, make_tiny_checkpoint, random_neuron_file
from tests.tiny_tokenizer import tiny_tokenizer
from transformers_patches import cli
from transformers_patches.errors import PartInferError

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model and an instruction-tuned one, with tokenizers."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for kind in ("base", "instruct"):
        made[kind] = make_tiny_checkpoint(root / kind, "llama")
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE if kind == "instruct" else None
        tokenizer.save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module")
def neurons(tmp_path_factory):
    path = tmp_path_factory.mktemp("neurons") / "qa.safetensors"
    random_neuron_file(1).save(path)
    return path


@pytest.fixture
def run(folders, neurons, capsys):
    """run(*flags, model="instruct") -> (exit code, standard output, standard error)."""

    def call(*flags: str, model: str = "instruct"):
        code = partinfer.main(
            [
                *("--checkpoint_path", str(folders[model]), "--start_num", "1", "--end_num", "4", "--cpu_only"),
                *("--dataset_neurons_filepath", str(neurons), "--num_tokens_to_generate", "6", *flags),
            ]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_json_is_one_object_with_counted_neurons(run):
    code, out, err = run("--prompt", "hi", "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["loaded_neurons_percent"], report["computed_neurons_percent"]) == (0.7, 0.4)
    assert report["generated_tokens"] <= 6
    assert report["prompt_tokens"] == len("u:hi\na:")
    assert report["finish_reason"] in ("stop", "length")
    assert report["weight_bytes_read"] < report["weight_bytes_dense"]
    assert "neurons loaded 70.0%, computed 40.0% in 4 of 6 layers" in err


def test_text_goes_to_standard_output_and_nothing_else(run):
    _, plain, err = run("--prompt", "hi")
    _, quiet, silent = run("--prompt", "hi", "--quiet")
    text = json.loads(run("--prompt", "hi", "--json")[1])["text"]
    assert plain == quiet == text + "\n"
    assert "first token" in err
    assert silent == ""


@pytest.mark.parametrize("method", ["partinfer", "coreinfer", "dense"])
def test_every_method_runs(run, method):
    report = json.loads(run("--prompt", "hi", "--json", "--method", method)[1])
    expected = {"partinfer": (0.7, 0.4), "coreinfer": (1.0, 0.4), "dense": (1.0, 1.0)}[method]
    assert (report["loaded_neurons_percent"], report["computed_neurons_percent"]) == expected


def test_dense_and_coreinfer_load_partially_when_told(run):
    dense = json.loads(run("--prompt", "hi", "--json", "--method", "dense", "--use_partial_loading")[1])
    core = json.loads(run("--prompt", "hi", "--json", "--method", "coreinfer", "--use_partial_loading")[1])
    assert (dense["loaded_neurons_percent"], dense["computed_neurons_percent"]) == (0.7, 0.7)
    assert (core["loaded_neurons_percent"], core["computed_neurons_percent"]) == (0.7, 0.4)


def test_base_models_get_worked_examples(run):
    few = json.loads(run("--prompt", "hi", "--json", "--num_fewshot", "1", model="base")[1])
    none = json.loads(run("--prompt", "hi", "--json", "--num_fewshot", "0", model="base")[1])
    assert none["prompt_tokens"] == len("Question: hi\nAnswer:")
    assert few["prompt_tokens"] > none["prompt_tokens"] + 20


@pytest.mark.parametrize("function", ["predefined_prompts", "compare"])
def test_answers_beside_a_prompt_that_fails_are_kept(function, run, monkeypatch):
    texts = ["one", "two " * 9999, "three"]  # longer than the context
    monkeypatch.setattr("transformers_patches.generation.runner.predefined_prompts", lambda _: texts)
    code, out, err = run("--function", function, "--json", "--quiet")
    report = json.loads(out)
    assert code == 1
    assert [result["prompt"] for result in report["results"]] == ["one", "three"]
    assert [failed["prompt"] for failed in report["failed"]] == texts[1:2]
    assert err.count("error: ") == 1


def test_answers_before_the_end_of_a_run_are_kept(run, monkeypatch, tmp_path):
    def texts(_):
        yield "one"
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_patches.generation.runner.predefined_prompts", texts)
    with pytest.raises(KeyboardInterrupt):
        run("--function", "predefined_prompts", "--json", str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text())["generated_tokens"] == 6


def test_predefined_prompts_are_all_answered(run):
    report = json.loads(
        run("--function", "predefined_prompts", "--task_type", "translate_de_en", "--json", "--quiet")[1]
    )
    assert len(report["results"]) == 5
    assert report["generated_tokens"] == sum(len(r["token_ids"]) for r in report["results"])


def test_chat_takes_turns_on_one_cache(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nand you?\n/exit\n"))
    first, second = json.loads(run("--function", "chat", "--json")[1])["results"]
    assert (first["prompt"], second["prompt"]) == ("hi", "and you?")
    assert second["prefilled_tokens"] < second["prompt_tokens"]


def test_a_turn_that_fails_does_not_end_a_chat(run, monkeypatch):
    turns = ["hi", "long " * 60, "again"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(turns)))
    code, out, err = run("--function", "chat", "--json")
    first, last = json.loads(out)["results"]
    assert code == 0
    assert (first["prompt"], last["prompt"]) == ("hi", "again")
    assert "error: the prompt has" in err
    assert last["prompt_tokens"] == len(f"u:hi\na:{first['text']}\nu:again\na:")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(turns[:2])))
    assert run("--function", "chat")[0] == 1


def test_a_line_that_is_no_text_does_not_end_a_chat(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhi\n"), encoding="utf-8"))
    code, out, err = run("--function", "chat", "--json")
    assert (code, json.loads(out)["generated_tokens"] > 0) == (0, True)
    assert "standard input is no utf-8 text (byte 0xe9 at place 3)" in err


def test_a_prompt_on_standard_input_is_text(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    with pytest.raises(PartInferError, match="byte 0xe9 at place 3"):
        run("--prompt", "-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfhi\n"), encoding="utf-8"))
    assert json.loads(run("--prompt", "-", "--json")[1])["prompt_tokens"] == len("u:hi\na:")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(PartInferError, match="standard input is closed"):
        run("--prompt", "-")


def test_chat_needs_a_chat_template(run):
    with pytest.raises(PartInferError, match="chat template"):
        run("--function", "chat", model="base")


def test_mask_file_is_the_plan_that_was_used(run, tmp_path, neurons):
    path = tmp_path / "mask.json"
    run("--prompt", "hi", "--mask_filepath", str(path))
    plan = json.loads(path.read_text())
    assert sorted(plan["layers"]) == ["1", "2", "3", "4"]
    layer = plan["layers"]["2"]
    assert (len(layer["neurons"]), layer["base_count"], layer["computed_count"]) == (56, 24, 32)
    assert layer["neurons"][:24] == random_neuron_file(1).ranking[2, :24].tolist()


def test_flags_win_over_the_config_file(run, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("sparsity: 0.5\nmethod: coreinfer\nprompt: hi\njson: true\nstop: [never, ever]\n")
    assert json.loads(run("--config", str(path))[1])["computed_neurons_percent"] == 0.5
    assert json.loads(run("--config", str(path), "--sparsity", "0.3")[1])["computed_neurons_percent"] == 0.3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sparsity", "1.5"], "sparsity must be a fraction in [0, 1], got 1.5"),
        (["--sparsity", "0.2", "--base_neurons_percent", "0.3"], "base_neurons_percent must be at most sparsity"),
        (["--memory_limit"], "memory_limit moves active neurons to a GPU"),
        (["--device", "cuda"], "--cpu_only contradicts --device cuda"),
        (["--num_tokens_to_generate", "0"], "num_tokens_to_generate must be at least 1"),
        (["--stop", "caf\udce9"], "--stop is not in the terminal's encoding"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--seed", str(10**30)], "seed must be from 0 to 4294967295, got 1000"),
        (["--temperature", "1e-320", "--sampling-method", "top-p"], "temperature must be at least 1e-06"),
        (["--method", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(run, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run("--prompt", "hi", *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_setting_in_the_config_file_is_wrong_usage(run, tmp_path, capsys):
    path = tmp_path / "settings.json"
    path.write_text('{"sparsty": 0.5}')
    with pytest.raises(SystemExit) as stopped:
        run("--config", str(path))
    assert stopped.value.code == 2
    assert "unknown setting 'sparsty'" in capsys.readouterr().err


def test_a_missing_model_is_one_line_and_exit_code_1(tmp_path):
    command = [sys.executable, str(ROOT / "partinfer.py"), "--model_name", "opt-1.3b"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "python download.py --model_name opt-1.3b" in ended.stderr


@pytest.mark.model
def test_the_demo_model_answers_with_part_of_its_neurons(demo_model, capsys):
    question = "What is the capital of France?"
    flags = ["--checkpoint_path", str(demo_model), "--prompt", question, "--num_tokens_to_generate", "24", "--json"]
    flags += ["--dtype", "float32"]  # in bfloat16 the order of a sum can decide between words
    partinfer.main([*flags, "--method", "dense"])
    dense = json.loads(capsys.readouterr().out)
    assert "Paris" in dense["text"]
    assert dense["finish_reason"] == "stop"
    partinfer.main(flags)
    bounded = json.loads(capsys.readouterr().out)
    assert bounded["settings"]["max_loss"] == 0.05
    assert 0 < bounded["predicted_loss"] <= 0.05
    assert bounded["loaded_neurons_percent"] == 1.0
    assert bounded["computed_neurons_percent"] == pytest.approx(bounded["settings"]["sparsity"], abs=0.1)
    assert "Paris" in bounded["text"]
    partinfer.main([*flags, "--loaded_neurons_percent", "0.7", "--sparsity", "0.4"])
    part = json.loads(capsys.readouterr().out)
    assert part["predicted_loss"] > 0.1
    assert part["loaded_neurons_percent"] == pytest.approx(0.7, abs=1e-3)
    assert part["computed_neurons_percent"] == pytest.approx(0.4, abs=1e-3)
    assert part["wholly_computed_neurons_percent"] == pytest.approx(0.25, abs=1e-3)  # the others' up rows only
    assert part["weight_bytes_resident"] < dense["weight_bytes_resident"]
    assert "Paris" in part["text"]
    partinfer.main([*flags, "--selection", "core", "--compensation", "none"])
    original = json.loads(capsys.readouterr().out)
    assert original["computed_neurons_percent"] == original["wholly_computed_neurons_percent"]
    assert original["computed_neurons_percent"] == pytest.approx(0.4, abs=1e-3)


def test_little_memory_is_kept_per_length_of_a_prompt_unless_told_otherwise(monkeypatch):
    for given, expected in (({}, cli.PRIMITIVES), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}, "1024")):
        environment = dict(given)
        monkeypatch.setattr(cli.os, "environ", environment)
        cli.prepare_torch()
        assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == expected


@pytest.mark.parametrize("given, expected", [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5")])
def test_threads_wait_briefly_unless_told_otherwise(given, expected, monkeypatch):
    environment = dict(given)
    monkeypatch.setattr(cli.os, "environ", environment)
    cli.wait_briefly()
    assert environment["GOMP_SPINCOUNT"] == expected


def test_compare_answers_dense_too_and_ends_with_a_table(run):
    code, out, _ = run("--function", "compare", "--prompt", "hi", "--sparsity", "0.5")
    assert code == 0
    assert "dense: " in out
    assert "partinfer: " in out
    assert out.count("MB of weights per token, ") == 2
    assert out.splitlines()[-2].startswith("dense")
    _, out, _ = run("--function", "compare", "--prompt", "hi", "--json")
    dense, partinfer_row = json.loads(out)["comparison"]
    assert partinfer_row["token_bytes"] < dense["token_bytes"]
    assert partinfer_row["weight_bytes_resident"] < dense["weight_bytes_resident"]
    assert dense["predicted_loss"] == 0.0
