"""How the kernels are built, found, and left out."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from transformers_patches import kernels
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import build

ROOT = Path(__file__).parents[3]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


SHOW = "from transformers_patches import kernels; print(kernels.available(), kernels.variant(), kernels.why_not())"


@pytest.mark.parametrize("value", ["off", "reference"])
def test_switched_off(value):
    done = python(SHOW, PARTINFER_KERNELS=value)
    assert done.stdout.strip() == f"False reference switched off by PARTINFER_KERNELS={value}"
    assert done.stderr == ""


def test_forced_variant(native):
    assert python(SHOW, PARTINFER_KERNELS="scalar").stdout.strip() == "True scalar"
    done = python(SHOW, PARTINFER_KERNELS="mmx")
    assert done.returncode == 1
    assert "kernels 'mmx' can't run here: expected off, reference or one of scalar" in done.stderr


def test_no_compiler_is_one_notice(tmp_path):
    code = f"{SHOW}; import torch; print(kernels.linear(torch.ones(1, 4), torch.ones(2, 4)).tolist())"
    done = python(code, PARTINFER_CACHE=str(tmp_path), CXX="no-such-compiler")
    assert done.stdout.splitlines()[1] == "[[4.0, 4.0]]"
    notices = [line for line in done.stderr.splitlines() if "no native kernels" in line]
    assert len(notices) == 1
    assert "no C++ compiler was found" in notices[0]


def test_failing_compiler_is_one_notice(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\necho "error: no space left" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    done = python(SHOW, PARTINFER_CACHE=str(tmp_path), CXX=str(compiler))
    assert done.returncode == 0
    assert done.stdout.startswith("False reference")
    assert "no native kernels" in done.stderr


def test_a_prebuilt_library_needs_no_compiler(native):
    done = python(SHOW, CXX="no-such-compiler")
    assert done.stdout.startswith("True")


def test_key_follows_sources_and_torch(monkeypatch, tmp_path):
    before = build.source_key()
    monkeypatch.setattr(build.torch, "__version__", "0.0")
    assert build.source_key() != before
    monkeypatch.undo()
    for path in build.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.source_key() == before
    (tmp_path / "types.h").write_text("changed")
    assert build.source_key() != before


def test_what_was_built_is_said(native):
    facts = json.loads((build.find_library().parent / "build.json").read_text())
    assert "scalar" in facts["variants"]
    assert set(kernels.variants()) <= set(facts["variants"])
    if platform.machine() == "x86_64":
        assert "avx2" in facts["variants"]


def test_only_one_openmp_is_loaded(native):
    done = python(f"{SHOW}; print([m.split()[-1] for m in open('/proc/self/maps') if 'omp' in m.rsplit('/', 1)[-1]])")
    assert len(set(eval(done.stdout.splitlines()[1]))) == 1  # noqa: S307


def test_variants_share_no_code(native, tmp_path):
    """A function that two variants define under one name could run AVX-512 where there is none."""
    isas = build.isas_of(platform.machine())
    name = next(name for name in reversed(isas) if "linear" in isas[name].sources)
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no compiler")
    target = tmp_path / "linear.o"
    flags = [*build.COMMON_FLAGS, *isas[name].flags, f"-DPARTINFER_ISA=isa_{name}", "-O0"]
    subprocess.run([compiler[0], *flags, "-c", str(build.SOURCES / "linear.cpp"), "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [line for line in symbols if line.split()[-2 if line.startswith(" ") else 1] in ("W", "V", "u")]
    assert weak
    assert [line for line in weak if f"isa_{name}::" not in line] == []


def test_unknown_variant_by_name(native):
    with pytest.raises(PartInferError, match="'sse9' can't run here"), kernels.use_variant("sse9"):
        pass


def test_probe_is_plausible():
    assert 1e8 < kernels.bandwidth_probe(32 << 20, 2) < 1e13
