"""The cache of compiled kernels: any folder, damage noticed, failures remembered, interrupted and doubled builds.

The fast tests build with a stand-in for the compiler, which notes down how it was called.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from transformers_patches.kernels import build
from transformers_patches.kernels.build import BuildError
from transformers_patches.kernels.commands import CommandFailed, run_all
from transformers_patches.kernels.library import ENVIRONMENT, Library
from transformers_patches.locks import PARTIAL

ROOT = Path(__file__).parents[3]
COMPILER = r"""#!/bin/sh
here=$(dirname "$0")
[ "$1" = --version ] && echo "stand-in 1.0" && exit
case " $* " in *" -shared "*) echo one >> "$here/links"; linking=yes ;; esac
[ -e "$here/fails" ] && echo "fatal error: no such header" >&2 && exit 1
while [ "$1" != -o ]; do shift; done
[ "$2" = /dev/null ] && exit
[ -e "$here/hangs" ] && [ -z "$linking" ] && touch "$here/begun" && sleep 60
printf %s "content of ${2##*/}" > "$2"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """The stand-in's folder, where `fails` and `hangs` change what it does; the cache's path has a space and more."""
    folder = tmp_path / "compiler"
    folder.mkdir()
    path = folder / "c++"
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("PARTINFER_CACHE", str(tmp_path / "a cache; touch $HOME 'x' \\ &"))
    monkeypatch.setattr(build, "SOURCES", ROOT / "transformers_patches" / "kernels" / "csrc")
    return folder


def links(compiler: Path) -> int:
    """How many libraries were made."""
    return len((compiler / "links").read_text().splitlines()) if (compiler / "links").exists() else 0


def in_cache() -> set[str]:
    return {path.name for path in build.cache_folder().iterdir()}


def test_any_path_will_do_and_only_the_library_is_kept(compiler):
    library = build.build(["scalar"])
    assert library.read_text() == f"content of {build.NAME}.so"
    assert {path.name for path in library.parent.iterdir()} == {f"{build.NAME}.so", "build.json"}
    assert build.find_library() == build.build(["scalar"]) == library
    assert links(compiler) == 1
    assert in_cache() == {library.parent.name}


def test_a_library_without_a_variant_that_is_needed_is_built_again_with_it(compiler):
    """So that a folder which several machines share serves them all."""
    first, others = build.build(["scalar"]), list(build.isas_of(platform.machine()))
    assert build.find_library(isa_names=["scalar"]) == first
    assert build.find_library(isa_names=others) == (first if others == ["scalar"] else None)
    assert build.build(others[:2]) == first
    assert json.loads(first.with_name("build.json").read_text())["variants"] == others[:2]
    assert build.build(["scalar"]) == first, "which is among them"
    assert links(compiler) == (1 if others == ["scalar"] else 2)


def test_the_processors_own_variants(monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    has = {"avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"}
    monkeypatch.setattr(build.torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    assert build.own_isas() == ["scalar", "avx2", "avx512"]
    monkeypatch.setattr(build.torch.cpu, "get_capabilities", dict)
    assert build.own_isas() == ["scalar"]
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.own_isas() == list(build.ISAS["aarch64"])


def test_a_relative_cache(compiler, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARTINFER_CACHE", "@here")
    assert build.build(["scalar"]).is_relative_to(tmp_path / "@here")


@pytest.mark.parametrize("harm", ["truncated", "empty", "changed", "no facts", "damaged facts", "facts are a list"])
def test_a_damaged_library_is_built_again(compiler, harm):
    library = build.build(["scalar"])
    good, facts = library.read_text(), library.with_name("build.json")
    match harm:
        case "truncated":
            library.write_text(good[:-1])
        case "empty":
            library.write_text("")
        case "changed":
            library.write_text("x" + good[1:])
        case "no facts":
            facts.unlink()
        case "damaged facts":
            facts.write_bytes(b'{"bytes": \xff')
        case _:
            facts.write_text("[1]")
    assert build.find_library() is None
    assert build.build(["scalar"]) == library
    assert library.read_text() == good
    assert links(compiler) == 2


def test_a_failed_build_is_remembered_until_it_is_tried_again(compiler, capsys):
    (compiler / "fails").touch()
    with pytest.raises(BuildError, match="the compiler failed: fatal error: no such header$"):
        build.build(["scalar"])
    (compiler / "fails").unlink()
    library = Library()
    assert library.get() is None
    assert f"to try again: {build.AGAIN}" in library.why_not
    assert capsys.readouterr().err.count("\n") == 1, "one line, and no word of compiling"
    with pytest.raises(BuildError, match="tried before"):
        build.build(["scalar"], again=False)
    assert links(compiler) == 0
    assert build.main(["--isa", "scalar"]) == 0
    assert build.find_failure() is None
    assert links(compiler) == 1


def test_another_compiler_is_tried(compiler):
    (compiler / "fails").touch()
    with pytest.raises(BuildError):
        build.build(["scalar"])
    (compiler / "c++").write_text(COMPILER.replace("stand-in 1.0", "stand-in 2.0"))
    assert build.find_failure() is None


def start_build(**environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "transformers_patches.kernels.build", "--isa", "scalar"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what runs in the background ignores Ctrl-C, and so would all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_stopped_ends_at_once_and_the_next_one_works(compiler, sent):
    (compiler / "hangs").touch()
    process = start_build()
    wait_for(compiler / "begun")
    start = time.monotonic()
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode != 0
    left = [name for name in in_cache() if name.endswith(PARTIAL)]
    assert left == [] or sent == signal.SIGKILL
    assert build.find_library() is None
    assert build.find_failure() is None
    (compiler / "hangs").unlink()
    library = build.build(["scalar"])
    assert in_cache() == {library.parent.name}


def test_two_builds_at_once_make_one_library(compiler):
    results = []
    threads = [threading.Thread(target=lambda: results.append(build.build(["scalar"]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 3
    assert len(set(results)) == 1
    assert links(compiler) == 1


def test_commands_end_with_the_first_that_fails():
    start = time.monotonic()
    with pytest.raises(CommandFailed, match="^an error of mine$"):
        run_all([["sh", "-c", "echo first; echo an error of mine >&2; exit 3"], ["sleep", "600"]])
    assert time.monotonic() - start < 30


def test_no_space_for_the_library(compiler, small_disk, monkeypatch):
    monkeypatch.setenv("PARTINFER_CACHE", str(small_disk))
    (compiler / "c++").write_text(COMPILER.replace("printf %s", 'head -c 1000000 /dev/zero > "$2" && printf %s'))
    with pytest.raises((BuildError, OSError)):
        build.build(["scalar"])
    assert build.find_library() is None
    assert not [name for name in in_cache() if name.endswith(PARTIAL)]


@pytest.mark.slow
def test_the_real_compiler_in_a_folder_with_a_space(tmp_path):
    if build.find_compiler() is None:
        pytest.skip("no compiler")
    cache = str(tmp_path / "a b; touch c")
    process = start_build(PARTINFER_CACHE=cache)
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    facts = json.loads((Path(out.splitlines()[0]).parent / "build.json").read_text())
    assert facts["variants"] == ["scalar"]
    show = "from transformers_patches import kernels; print(kernels.variant())"
    done = subprocess.run(
        [sys.executable, "-c", show],
        cwd=ROOT,
        env=os.environ | {"PARTINFER_CACHE": cache, ENVIRONMENT: "scalar"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "scalar"
