"""Where a model is and what it is called, from what the user gives: a path, a short name, or a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from transformers_patches.catalog import fetch_command, folder_name
from transformers_patches.errors import PartInferError
from transformers_patches.weights.file_kinds import is_gguf, what_it_is

# Where download.py puts models: in the current folder, and in the repository.
_PLACES = (Path("models"), Path(__file__).resolve().parents[2] / "models")
_QUANTIZATION = re.compile(r"[-._](?:Q\d+(?:_[0-9A-Z]+)*|IQ\d+_\w+|F16|BF16|F32)$", re.IGNORECASE)
_PART = re.compile(r"-\d{5}-of-\d{5}$")


def find_model(name: str | Path | None, checkpoint_path: str | Path | None = None) -> Path:
    """The checkpoint folder, pack or GGUF file of a model, as a path that keeps the name the user gave.

    name: a path, a name in models/, or a short name or hub id that was downloaded; ignored if the path is given. Raises
    PartInferError, with the command that fetches it, if there is no model.
    """
    if checkpoint_path is not None:
        if not _is_model(Path(checkpoint_path)):
            raise PartInferError(_missing_at(Path(checkpoint_path)))
        return Path(checkpoint_path)
    given = Path(name)
    found = next((place for place in (given, *(place / given for place in _PLACES)) if _is_model(place)), None)
    if found is not None:
        return found
    if given.exists() or given.is_absolute():
        raise PartInferError(_missing_at(given))
    usual = [place / folder_name(str(name)) for place in _PLACES]
    found = next((place for place in usual if _is_model(place)), None)
    if found is None:
        raise PartInferError(f"no model at {usual[0]}: fetch it with {fetch_command(str(name))}")
    return found


def _is_model(path: Path) -> bool:
    return path.is_file() and is_gguf(path) or (path / "config.json").is_file()


def _missing_at(path: Path) -> str:
    what = "config.json is missing"
    if path.is_file():
        kind = what_it_is(path)
        what = "neither a folder nor a GGUF file" if kind is None else f"it is {kind}"
    return f"no model at {path} ({what}): fetch one with {fetch_command('NAME')}"


def gguf_model_name(path: str | Path) -> str:
    """The file's name without its ending and type: SmolLM2-135M-Instruct of SmolLM2-135M-Instruct-Q4_K_M.gguf."""
    name = Path(path).name
    name = name[: -len(".gguf")] if name.lower().endswith(".gguf") else name
    return _QUANTIZATION.sub("", _PART.sub("", name))


def model_name(path: str | Path) -> str:
    """The folder's name, a GGUF file's without its type, or, in the hub's cache, the repository's name.

    Links keep the name that the user gave: what is behind them is often called by a hash.
    """
    path = Path(os.path.abspath(path))  # not resolve(), which follows links
    if is_gguf(path):
        return gguf_model_name(path)
    repository = path.parent.parent.name  # models--OWNER--NAME/snapshots/COMMIT
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return path.name


def model_names(path: str | Path) -> list[str]:
    """The names by which a model's neuron files are looked up: as the user calls it, then what is behind links."""
    return list(dict.fromkeys((model_name(path), model_name(Path(path).resolve()))))
