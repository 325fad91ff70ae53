"""Files and folders that are either wholly written or not there: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transformers_patches.errors import PartInferError
from transformers_patches.locks import clear_leftovers, partial

if TYPE_CHECKING:
    import torch

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_OWN_STREAMS = re.compile(r"/dev/(stdout|stderr|fd/\d+)|/proc/[^/]+/fd/\d+")


def shipped(name: str) -> Path:
    """A folder of files that come with the project: in the package where it is installed, else beside it."""
    package = Path(__file__).resolve().parent
    installed = package / "shipped" / name
    return installed if installed.is_dir() else package.parent / name


def cache_folder(kind: str) -> Path:
    """Where what can be made again is kept: a folder of $PARTINFER_CACHE, else of ~/.cache/partinfer."""
    given = os.environ.get("PARTINFER_CACHE")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "partinfer").absolute() / kind


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    _sync(folder)


def sync_tree(folder: Path) -> None:
    """Make everything in a folder durable, and the folder."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, so that they survive a power cut."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync_folder(place.parent)


def check_new(path: str | Path, *, overwrite: bool) -> None:
    """Raise PartInferError if an output exists that was not asked to be replaced, or that is not a file."""
    if Path(path).exists() and not overwrite:
        raise PartInferError(f"{path} already exists: replace it with --overwrite, or give another --output")
    check_regular(path)


def check_regular(path: str | Path) -> None:
    """Raise PartInferError if there is a folder, device, pipe or socket where a file is to be written."""
    kind = _kind(path)
    if kind is not None:
        raise PartInferError(f"{path} is {kind}: give the path of a file")


def _kind(path: str | Path) -> str | None:
    """What a path leads to, if it is something other than a file."""
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except FileNotFoundError:
        return None


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; renamed onto it when the block ends well, removed when it does not.

    Links are followed, a new file gets the mode that the umask says, and one that is replaced keeps its own. Raises
    PartInferError for what is not a file, and OSErrors that name `path`.
    """
    check_regular(path)
    place = Path(os.path.realpath(path))
    with _named(path):
        make_folder(place.parent)
        clear_leftovers(place.parent)
        with partial(place) as temporary:
            yield temporary
            if place.exists():
                os.chmod(temporary, stat.S_IMODE(place.stat().st_mode))
            _sync(temporary)
            os.replace(temporary, place)
            sync_folder(place.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which must not exist; synced and renamed if the block ends well, else removed.

    Links are followed. OSErrors name `path`.
    """
    place = Path(os.path.realpath(path))
    with _named(path):
        make_folder(place.parent)
        clear_leftovers(place.parent)
        with partial(place, folder=True) as temporary:
            yield temporary
            sync_tree(temporary)
            os.replace(temporary, place)
            sync_folder(place.parent)


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A folder for one run among the system's temporary files. Those left by killed runs are removed."""
    parent = Path(tempfile.gettempdir())
    clear_leftovers(parent)
    with partial(parent / f"partinfer-{purpose}", folder=True) as folder:
        folder.chmod(0o700)
        yield folder


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Makes errors of the operating system name the path that was given, not a temporary one, or none."""
    name = os.path.basename(os.path.realpath(path))
    try:
        yield
    except OSError as error:
        if error.filename is None or f".{name}." in str(error.filename):
            error.filename, error.filename2 = str(path), None
        raise


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write UTF-8 text to a path, whole or not at all. Devices and pipes are written to directly."""
    if _OWN_STREAMS.fullmatch(str(path)) or _kind(path) not in (None, "a folder"):
        with _named(path), open(path, "a", encoding="utf-8") as stream:
            stream.write(text)
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors_atomic(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all; the same content always gives the same bytes.

    safetensors writes metadata in the order of a hash table that is seeded per process, so the header is sorted here.
    """
    from safetensors.torch import save  # imports torch, which scripts that only write texts import later, or never

    content = save(tensors, metadata=metadata)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data stays aligned to 8 bytes, as the format asks
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(memoryview(content)[8 + size :])
