"""The house's rules that no linter knows, and proof that the contract of the imports (pyproject.toml) can break."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["transformers_patches", "downloads", "texts", "profiler", "evaluation", "server", "benchmarks"]
MOST_LINES = 60  # of a function, its signature and docstring included
LONGER: set[str] = set()  # functions that may be longer, as `path name`, each with a reason
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of the packages' Python files, with the contract."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_no_model_brings_code_of_its_own():
    """Where transformers may be asked to run what lies in a model's folder, the answer is no, and given beforehand."""
    wrong = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                    continue
                if call.func.attr not in ("from_pretrained", "from_config") or "Auto" not in ast.unparse(call.func):
                    continue
                if not any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in call.keywords):
                    wrong.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert wrong == []


def lint_imports(folder: Path) -> tuple[int, str]:
    """Exit code of lint-imports in `folder`, and what it printed in one line."""
    command = [sys.executable, "-c", LINT, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_the_import_contract_holds(sources):
    code, printed = lint_imports(sources)
    assert code == 0, printed
    assert "0 broken" in printed


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        (
            "transformers_patches/modules/quantized.py",
            "from transformers_patches.load.loader import load_model",
            "transformers_patches.modules.quantized -> transformers_patches.load.loader",
        ),
        (
            "transformers_patches/plan/load_plan.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers_patches.sparse.prior import Prior",
            "transformers_patches.plan.load_plan -> transformers_patches.sparse.prior",
        ),
        (
            "transformers_patches/weights/source.py",
            "from transformers_patches.weights.pack import Pack",
            "No cycles are allowed in transformers_patches.weights",
        ),
        (
            "transformers_patches/generation/runner.py",
            "from evaluation.methods import METHODS",
            "transformers_patches.generation.runner -> evaluation.methods",
        ),
        ("evaluation/models.py", "from server.engine import Engine", "evaluation.models -> server.engine"),
        (
            "transformers_patches/generation/runner.py",
            "from server.serve import serve",
            "transformers_patches.generation.runner -> server.serve",
        ),
        ("profiler/texts.py", "from evaluation.methods import METHODS", "profiler.texts -> evaluation.methods"),
        ("texts/files.py", "from profiler.templates import TEXT", "texts.files -> profiler.templates"),
        ("evaluation/models.py", "from partinfer import main", "evaluation.models -> partinfer"),
        (
            "evaluation/models.py",
            "from evaluation.evaluate_task import main",
            "evaluation.models -> evaluation.evaluate_task",
        ),
    ],
    ids=[
        "upward",
        "upward for type checking",
        "circle",
        "evaluation",
        "server",
        "server from below",
        "siblings",
        "texts",
        "script",
        "script in a package",
    ],
)
def test_an_import_against_the_contract_is_named(sources, file, line, named):
    path = sources / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    code, printed = lint_imports(sources)
    assert code == 1, printed
    assert named in printed


def test_few_modules_lie_directly_in_transformers_patches():
    """A concept with several modules gets a package of its own."""
    modules = [path.name for path in (ROOT / "transformers_patches").glob("*.py")]
    assert len(modules) <= 12, sorted(modules)


def python_files() -> list[Path]:
    """The project's Python files, without what an environment or a build folder holds."""
    folders = [*PACKAGES, "docs", "tests"]
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


def long_functions(path: Path) -> list[str]:
    """`name (lines)` of each function that is too long."""
    sizes = [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [f"{name} ({lines} lines)" for name, lines in sizes if lines > MOST_LINES]


def test_functions_are_short():
    found = [f"{path.relative_to(ROOT)} {text}" for path in python_files() for text in long_functions(path)]
    assert len(python_files()) > 100
    assert [text for text in found if text.rsplit(" (", 1)[0] not in LONGER] == []


def test_a_long_function_is_found(tmp_path):
    path = tmp_path / "long.py"
    path.write_text("def short():\n" + "    x = 1\n" * 59 + "\n\ndef long():\n" + "    x = 1\n" * 60)
    assert long_functions(path) == ["long (61 lines)"]
