"""`pip install .`: the commands, and what they need, from a wheel outside of the repository."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import ROOT
from transformers_patches import VERSION
from transformers_patches.generation.prompts import predefined_prompts

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LEFT_OUT = (".*", "models", "datasets", "results", "build", "tests", "docs", "__pycache__", "*.egg-info")


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_every_command_is_there(command):
    module, _, function = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def call(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder in which the wheel is installed, without what it depends on."""
    root = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, root / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(root), str(root / "source"))
    (wheel,) = root.glob("partinfer-*.whl")
    call(*pip, "install", "--no-deps", "--target", str(root / "installed"), str(wheel))
    return root / "installed"


def run(installed, *command: str, folder=None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return call(*command, env=environment, cwd=folder or installed.parent)


LOOK = """
from importlib.util import find_spec
from pathlib import Path
import transformers_patches
from transformers_patches.catalog import fetch_command
from transformers_patches.files import shipped
from transformers_patches.generation.prompts import few_shot_examples, predefined_prompts
from transformers_patches.kernels.build import SOURCES
from transformers_patches.neurons.lookup import find_neuron_files
from evaluation.task_runs import TASKS
from profiler.texts import BUILTIN_FOLDER

print(Path(transformers_patches.__file__).parent.parent)
print(len(predefined_prompts("QA")), len(few_shot_examples("Summarize", 1)))
print(find_neuron_files(["SmolLM2-135M-Instruct"], "QA").dataset.is_relative_to(shipped("neuron_files")))
print(*(sorted(path.name for path in folder.iterdir() if path.is_file()) for folder in (SOURCES, TASKS, BUILTIN_FOLDER)))
print(fetch_command("opt-125m"))
print(Path(find_spec("server").submodule_search_locations[0], "page.html").is_file())
"""


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.slow
def test_a_wheel_holds_all_that_the_commands_need(installed):
    assert run(installed, str(installed / "bin" / "partinfer"), "--version").strip() == f"PartInfer {VERSION}"
    assert "run " in run(installed, str(installed / "bin" / "partinfer-profile"), "--help")
    place, prompts, neurons, files, fetch, page = run(installed, sys.executable, "-c", LOOK).splitlines()
    assert place == str(installed)
    assert prompts == f"{len(predefined_prompts('QA'))} 1"
    assert neurons == "True"
    folders = (ROOT / "transformers_patches/kernels/csrc", ROOT / "evaluation/tasks", ROOT / "profiler/builtin")
    assert files == " ".join(str(names(folder)) for folder in folders)
    assert fetch == "partinfer-download --model_name opt-125m"
    assert page == "True"


@pytest.mark.slow
@pytest.mark.model
def test_the_installed_command_answers(installed, demo_model):
    folder = installed.parent / "elsewhere"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / demo_model.name).symlink_to(demo_model.resolve())
    flags = ("--prompt", "What is the capital of France?", "--num_tokens_to_generate", "8", "--quiet")
    assert "Paris" in run(installed, str(installed / "bin" / "partinfer"), *flags, folder=folder)
