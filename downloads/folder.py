"""Folders that are either complete or not there: built beside their place, synced, then renamed onto it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers_patches.errors import PartInferError
from transformers_patches.files import sync_folder, sync_tree

MANIFEST = "partinfer_download.json"


@dataclass(frozen=True)
class Manifest:
    """What download.py has put into a folder."""

    name: str  # hub id
    source: str  # hub or pypi
    revision: str | None  # the one asked for
    files: dict[str, int]  # relative path -> size in bytes

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where there is none or it can't be read."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_manifest(folder: Path, name: str, source: str, revision: str | None) -> Manifest:
    """Write down what is in a finished folder, with sizes, so that damage shows later."""
    manifest = Manifest(name, source, revision, sizes_of(folder))
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def sizes_of(folder: Path) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by relative path, without the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path.name != MANIFEST}


def damage(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with a folder's files by its manifest, in a few words; None if nothing is."""
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def work_folder(target: Path) -> Path:
    """Where an unfinished download lives: beside its target, kept when interrupted so that it can go on."""
    return target.with_name(f"{target.name}.partial")


def publish(finished: Path, target: Path) -> None:
    """Sync a finished folder to disk and rename it to its place, over what download.py put there earlier.

    Its files get the mode that the umask gave the folder: some libraries make theirs readable for their owner only.
    """
    mode = stat.S_IMODE(finished.stat().st_mode) & 0o666
    for path in finished.rglob("*"):
        if path.is_file():
            path.chmod(mode)
    sync_tree(finished)
    if target.exists():
        shutil.rmtree(target)
    os.replace(finished, target)
    sync_folder(target.parent)


def check_free_space(needed_bytes: int, folder: Path) -> None:
    """PartInferError if the disk of a folder has less free than needed_bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise PartInferError(
            f"not enough disk space at {folder}: {needed_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
            "free some or give another folder"
        )
