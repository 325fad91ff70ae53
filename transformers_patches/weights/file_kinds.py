"""What a model on disk is, by its first bytes or a name, and what a file of the wrong kind is, so that messages help."""

from __future__ import annotations

from pathlib import Path

MAGIC = b"GGUF"  # the first bytes of a GGUF file
PACK = "pack.json"  # what makes a folder a pack
_STARTS = {
    MAGIC: "a GGUF file: give the file itself",
    b"PK\x03\x04": "PyTorch's .bin format: python download.py converts such models to safetensors",
    b"\x80\x02": "PyTorch's old .bin format: python download.py converts such models to safetensors",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: fetch the model again",
    b"<!DOCTYPE": "a web page: fetch the model again",
    b"<html": "a web page: fetch the model again",
    b"\x1f\x8b": "compressed with gzip: unpack it",
}


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do: the length of a header, and an object."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    except OSError:
        return False


def what_it_is(path: Path) -> str | None:
    """What a file is instead, and what to do about it; None if its first bytes don't say."""
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError:
        return None
    if is_safetensors(path):
        return "a safetensors file: give the folder that it lies in, with its config.json"
    return next((what for magic, what in _STARTS.items() if start.startswith(magic)), None)


def is_gguf(path: str | Path) -> bool:
    """Whether a checkpoint is one GGUF file: by its first bytes, or by its name if those can't be read."""
    path = Path(path)
    named = path.suffix.lower() == ".gguf" and not path.is_dir()
    if not path.is_file():
        return named
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC or named
    except OSError:
        return named  # what reads it says why it can't be read


def is_pack(folder: str | Path) -> bool:
    """Whether a folder is a pack."""
    return (Path(folder) / PACK).is_file()
