"""Is a model folder that somebody put there complete? Judged by its files, without loading them."""

from __future__ import annotations

import json
from pathlib import Path

TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def missing_part(folder: Path) -> str | None:
    """What a folder lacks to be a Hugging Face model with safetensors, in a few words; None if it is complete."""
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        return "the tokenizer is missing"
    try:
        shards = _shards(folder)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "model.safetensors.index.json can't be read"
    for shard in shards:
        if not (folder / shard).is_file():
            return f"{shard} is missing"
        if not _is_whole(folder / shard):
            return f"{shard} is cut off or damaged"
    return None


def _shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():  # shards beside it are ignored
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
    return path.stat().st_size == 8 + length + max(ends, default=0)
