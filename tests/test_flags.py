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
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PartInferError("no model at x"), 1, "error: no model at x\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied\n"),
        (OSError("several\nlines"), 1, "error: input or output: several lines\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(error, code, said, capsys):
    assert cli.guarded(raising(error)) == code
    assert capsys.readouterr().err == said


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
