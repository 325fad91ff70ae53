"""pytorch_model*.bin to safetensors shards, one shard in memory at a time."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from transformers_patches.errors import PartInferError
from transformers_patches.files import write_text_atomic

SHARD_BYTES = 2 * 2**30
INDEX = "model.safetensors.index.json"


def convert_bin(source: Path, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the tensors of source/pytorch_model*.bin into target as model.safetensors, or as shards with an index.

    Nothing but tensors is unpickled (torch.load with weights_only). Names that share all of one storage stand for
    tied weights: one is kept, the input embedding rather than the output head, where config.json ties them, since
    loading ties them again; else each gets its own copy. Raises PartInferError for files that can't be read.
    """
    tied = _ties_embeddings(source)
    shards = [shard for path in _bin_files(source) for shard in _plan(path, tied, shard_bytes)]
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    weight_map: dict[str, str] = {}
    total = 0
    for name, (path, keys) in zip(tqdm(names, "converting .bin to safetensors"), shards, strict=True):
        state = _load(path)
        # clones: every tensor owns exactly its bytes, whatever views the file held
        tensors = {key: state[key].clone(memory_format=torch.contiguous_format) for key in keys}
        del state
        try:
            save_file(tensors, target / name, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, most likely
            reason = " ".join(str(error).split())
            raise PartInferError(f"{target / name} can't be written: {reason}; free some space and try again") from None
        weight_map |= dict.fromkeys(keys, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text_atomic(target / INDEX, json.dumps(index, indent=1) + "\n")


def _bin_files(folder: Path) -> list[Path]:
    index = folder / "pytorch_model.bin.index.json"
    if not index.is_file():
        return [folder / "pytorch_model.bin"]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PartInferError(f"{index} can't be read (truncated?): fetch it again") from None


def _load(path: Path) -> dict[str, torch.Tensor]:
    """A state dict whose tensors stay in the mapped file until they are touched."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)  # the format from before torch 1.6
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise PartInferError(f"{path} can't be read (truncated?): {' '.join(str(error).split())[:150]}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise PartInferError(f"{path} holds something other than named tensors: give a plain state dict")
    return state


def _plan(path: Path, tied: bool, shard_bytes: int) -> list[tuple[Path, list[str]]]:
    """Cut one .bin file into shards: (the file, names of its tensors), each up to shard_bytes, none empty."""
    state = _load(path)
    shards: list[tuple[Path, list[str]]] = []
    size = 0
    for key in _kept_names(state) if tied else state:
        if not shards or size + state[key].nbytes > shard_bytes:
            shards.append((path, []))
            size = 0
        shards[-1][1].append(key)
        size += state[key].nbytes
    return shards


def _kept_names(state: dict[str, torch.Tensor]) -> list[str]:
    """All names, except output heads that are the very tensor of another name."""

    def place(tensor: torch.Tensor) -> tuple:
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype

    uses = Counter(place(tensor) for tensor in state.values())
    return [key for key, tensor in state.items() if not (_is_head(key) and uses[place(tensor)] > 1)]


def _is_head(name: str) -> bool:
    return name.split(".")[-2:-1] in (["lm_head"], ["embed_out"])


def _ties_embeddings(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PartInferError(f"{folder / 'config.json'} can't be read: fetch the model again") from None
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    from transformers_patches.weights.model_files import read_config

    return bool(getattr(read_config(folder), "tie_word_embeddings", True))
