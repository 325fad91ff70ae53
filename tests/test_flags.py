"""One set of flags: every script takes the model, and says what it found, in the same words."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys

import pytest

import partinfer
from profiler.__main__ import COMMANDS, build_parser
from tests.conftest import ROOT
from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError

FLAGS = (*("model_name", "checkpoint_path", "device", "cpu_only", "dtype", "threads", "json", "quiet", "config"),)
COMPUTING = ("device", "cpu_only", "dtype", "threads")
MODEL = ("model_name", "checkpoint_path", *COMPUTING)
NO_MODEL = "reads files that name their model, and never the model"
PROMPT = "has no progress to hide, and prints its result only"
# What a script leaves out, and why.
NOT_APPLICABLE = {
    "download": dict.fromkeys(COMPUTING, "fetches a model, and computes nothing with it"),
    "evaluate memory": {
        **dict.fromkeys(("device", "cpu_only"), "limits memory of the CPU's processes"),
        "dtype": "compares what files hold",
    },
    "evaluate report": {**dict.fromkeys(MODEL, NO_MODEL), "quiet": PROMPT},
    "profiler random": {**dict.fromkeys(COMPUTING, "reads the shape and four small tensors"), "quiet": PROMPT},
    "profiler convert": {**dict.fromkeys(COMPUTING, "reads the shape and four small tensors"), "quiet": PROMPT},
    **{
        f"profiler {command}": {**dict.fromkeys(MODEL, NO_MODEL), "quiet": PROMPT}
        for command in ("merge", "rank", "show", "compare")
    },
}
# Scripts whose command line is somebody else's.
FOREIGN = {"partinfer_lm": "lm-eval's own command line; every setting goes through --model_args"}


def scripts() -> dict[str, argparse.ArgumentParser]:
    """The parser of every script and profiler command, by name."""
    found = {"partinfer": partinfer.build_parser()}
    found["download"] = importlib.import_module("downloads.command").build_parser()
    for path in sorted((ROOT / "evaluation").glob("*.py")):
        if "__main__" in path.read_text(encoding="utf-8") and path.stem not in FOREIGN:
            module = importlib.import_module(f"evaluation.{path.stem}")
            found[f"evaluate {path.stem.removeprefix('evaluate_')}"] = module.build_parser()
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    return found | {f"profiler {name}": parser for name, parser in commands.items()}


SCRIPTS = scripts()


def test_every_script_is_looked_at():
    assert {f"profiler {command}" for command in COMMANDS} < SCRIPTS.keys()
    assert {"evaluate task", "evaluate perplexity", "evaluate speed", "evaluate report"} < SCRIPTS.keys()
    assert NOT_APPLICABLE.keys() < SCRIPTS.keys()


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_every_flag_or_says_why_not(script, flag):
    taken = f"--{flag}" in SCRIPTS[script]._option_string_actions
    assert taken != bool(NOT_APPLICABLE.get(script, {}).get(flag))


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_flags_have_the_same_form_everywhere(script):
    actions = SCRIPTS[script]._option_string_actions
    forms = {"json": ("?", "-"), "quiet": (0, True), "cpu_only": (0, True)}
    for flag, form in forms.items():
        action = actions.get(f"--{flag}")
        assert action is None or (action.nargs, action.const) == form


def parser_of(*more: str, positional: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    if positional:
        parser.add_argument("files", nargs="*")
    flags.add_computing(flags.add_model(parser))
    parser.add_argument("--device", default="auto")
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_config(parser)
    return parser


@pytest.mark.parametrize(
    ("positional", "given", "json_", "files"),
    [
        (False, [], None, None),
        (False, ["--json"], "-", None),
        (False, ["--json", "out.json"], "out.json", None),
        (False, ["--json", "--quiet"], "-", None),
        (True, ["--json", "qa.json"], "-", ["qa.json"]),  # a neuron file, which must not be written over
        (True, ["--js", "qa.json"], "-", ["qa.json"]),
        (True, ["--json=out.json", "qa.json"], "out.json", ["qa.json"]),
        (True, ["qa.json", "--json"], "-", ["qa.json"]),
    ],
)
def test_json_takes_a_file_only_where_no_other_file_can_be_meant(positional, given, json_, files):
    arguments = flags.parse(parser_of(positional=positional), given)
    assert arguments.json == json_
    assert getattr(arguments, "files", None) == files


@pytest.mark.parametrize(("value", "expected"), [("true", "-"), ("false", None), ("out.json", "out.json")])
def test_json_in_a_config_file(tmp_path, value, expected):
    path = tmp_path / "settings.yaml"
    path.write_text(f"json: {value}\nthreads: 2\n")
    arguments = flags.parse(parser_of(positional=True), ["--config", str(path), "a"])
    assert (arguments.json, arguments.threads, arguments.files) == (expected, 2, ["a"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--cpu_only", "--device", "cuda"], "--cpu_only contradicts --device cuda"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--threads", "100000"], "threads must be from 1 to 1024, got 100000"),
        (["--json", ""], "--json is empty: give the path of a file"),
    ],
)
def test_contradictions_are_wrong_usage(given, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse(parser_of(), given)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert flags.parse(parser_of(), ["--cpu_only"]).device == "cpu"


def test_settings_of_a_command_come_from_a_file_too(tmp_path, capsys):
    from profiler.__main__ import main

    path = tmp_path / "settings.yaml"
    path.write_text("score: nonsense\n")
    with pytest.raises(SystemExit) as stopped:
        main(["rank", "--config", str(path), "x.safetensors", "--output", "y.safetensors"])
    assert stopped.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def raising(error: BaseException):
    def main():
        if isinstance(error, bytes):
            error.decode("utf-8")
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PartInferError("no model at x"), 1, "error: no model at x\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied\n"),
        (OSError("several\nlines"), 1, "error: input or output: several lines\n"),
        (MemoryError(), 1, "error: not enough memory\n"),
        (RuntimeError("in a\nlibrary"), 1, "error: RuntimeError: in a library (--debug shows where)\n"),
        ("é".encode("latin-1"), 1, "error: text that can't be read or written: 'utf-8' codec can't decode byte 0xe9"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(error, code, said, capsys):
    assert cli.guarded(raising(error)) == code
    shown = capsys.readouterr().err
    assert shown.startswith(said)
    assert shown.count("\n") == (said != "")


def test_debug_shows_where_an_error_comes_from(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["partinfer.py", "--debug"])
    assert cli.guarded(raising(RuntimeError("in a library"))) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "in main" in shown
    assert shown.endswith("error: RuntimeError: in a library (--debug shows where)\n")


def test_every_command_has_debug():
    for command in (["partinfer.py"], ["download.py"], ["evaluate_speed.py"], ["-m", "profiler", "show"]):
        shown = subprocess.run(
            [sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert "--debug" in shown.stdout, command


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('quiet: "false"', "quiet: expected true or false, got 'false'"),
        ("quiet: 1", "quiet: expected true or false, got 1"),
        ("checkpoint_path: {a: b}", "checkpoint_path: expected a text or a number, got {'a': 'b'}"),
        ("checkpoint_path: [a, b]", "checkpoint_path: expected one value, got a list of 2"),
        ("checkpoint_path: yes", "checkpoint_path: expected a text or a number, got True"),
        ("checkpoint_path: 2020-01-01", "checkpoint_path: expected a text or a number, got datetime.date"),
        ("stop: [[a]]", "stop: expected a text or a number, got ['a']"),
        ("debug: true", "unknown setting 'debug'"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("[" * 5000, "can't be read"),
    ],
)
def test_values_of_a_config_file_are_values(tmp_path, capsys, content, said):
    (tmp_path / "settings.yaml").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        flags.parse(partinfer.build_parser(), ["--config", str(tmp_path / "settings.yaml")])
    assert stopped.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_values_that_look_like_flags_are_values(tmp_path):
    (tmp_path / "settings.yaml").write_text(
        'stop: ["---", "-1", "--json", "a=b"]\nprompt: -x\nquiet: false\njson: true\n'
    )
    arguments = flags.parse(partinfer.build_parser(), ["--config", str(tmp_path / "settings.yaml")])
    assert arguments.stop == ["---", "-1", "--json", "a=b"]
    assert (arguments.prompt, arguments.quiet, arguments.json) == ("-x", False, "-")


def test_keys_to_ignore_in_a_config_file(tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "IGNORED_GGUF_KEYS", set())
    (tmp_path / "settings.yaml").write_text("ignore_gguf_key: [llama.a, llama.b]\n")
    flags.parse(partinfer.build_parser(), ["--config", str(tmp_path / "settings.yaml")])
    assert {"llama.a", "llama.b"} == flags.IGNORED_GGUF_KEYS


def test_a_config_file_that_is_no_utf8_is_wrong_usage(tmp_path, capsys):
    (tmp_path / "settings.yaml").write_bytes(b"prompt: caf\xe9")
    with pytest.raises(SystemExit) as stopped:
        flags.parse(partinfer.build_parser(), ["--config", str(tmp_path / "settings.yaml")])
    assert stopped.value.code == 2
    assert "can't be read: 'utf-8' codec can't decode byte 0xe9" in capsys.readouterr().err


def test_an_output_that_lacks_a_character_shows_another():
    program = "from transformers_patches import cli\n"
    program += "cli.run(lambda: (print('日'), cli.write_json('-', {'a': '日'})) and 0)"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert ended.stdout == b'?\n{"a": "\\u65e5"}\n'


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        (">/dev/full", "error: input or output: No space left on device\n"),
        (">&-", "error: standard output is closed\n"),
    ],
)
def test_an_output_that_takes_nothing_is_one_line(redirection, said):
    program = "from transformers_patches import cli; cli.run(lambda: print('text'))"
    command = f'{sys.executable} -c "{program}" {redirection}'
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr) == (1, said)


def test_a_reader_that_has_seen_enough_is_no_error_message():
    program = "from transformers_patches import cli\ncli.run(lambda: print('line\\n' * 100000))"
    command = f'{sys.executable} -c "$PROGRAM" | head -1; echo ${{PIPESTATUS[0]}}'
    ended = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PROGRAM": program},
        check=True,
    )
    assert ended.stdout == "line\n1\n"
    assert ended.stderr == ""


def test_a_result_is_text_an_object_or_both(tmp_path, capsys):
    cli.report(None, {"a": 1}, "text")
    assert capsys.readouterr().out == "text\n"
    cli.report("-", {"a": "ä"}, "text")
    assert capsys.readouterr().out == '{"a": "ä"}\n'
    cli.report(str(tmp_path / "out.json"), {"a": 1}, "text")
    assert capsys.readouterr().out == "text\n"
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": 1}
