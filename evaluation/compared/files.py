"""GGUF files of a model for llama.cpp, in the types that its own quantiser makes.

The base is the checkpoint's GGUF file where there is one: download.py --keep_gguf puts it beside the checkpoint that was
unpacked from it. It stands for its own type, and the others are quantised again from it. Otherwise the checkpoint's
weights are written in their own float type. No importance matrix is used.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PretrainedConfig

from evaluation.compared.kinds import QUANTIZED, SAME_BITS, ComparedFile
from transformers_patches.errors import PartInferError
from transformers_patches.weights.file_kinds import is_gguf
from transformers_patches.weights.gguf_file import read_gguf
from transformers_patches.weights.source import WeightSource

_KINDS = {number: kind for kind, number in QUANTIZED.items()}


class ComparedFiles:
    """The files of one model, each made once. Raises PartInferError where llama.cpp is not installed.

    checkpoint: the model's folder or GGUF file; None for random weights
    weights: opens the model's weights
    config: its config
    dtype: the type of its float weights
    folder: where files are written; whoever made it removes it
    """

    def __init__(
        self,
        checkpoint: Path | None,
        weights: Callable[[], WeightSource],
        config: PretrainedConfig,
        dtype: str,
        folder: Path,
    ) -> None:
        if importlib.util.find_spec("llama_cpp") is None:
            raise PartInferError("llama.cpp is not installed: pip install llama-cpp-python, or leave out --compare")
        self._own = None if checkpoint is None else own_file(checkpoint)
        self._weights, self._config, self._dtype, self._folder = weights, config, dtype, folder
        self._found: dict[str, ComparedFile] = {}

    def file(self, kind: str) -> ComparedFile:
        """The file of a type: a key of QUANTIZED, or a float type, which is written from the checkpoint's weights."""
        if kind not in self._found:
            if self._own is not None and kind == file_kind(self._own):
                self._found[kind] = _described(self._own, kind, f"{self._own.name} itself")
            elif kind in QUANTIZED:
                self._found[kind] = self._quantized(kind)
            else:
                self._found[kind] = self._written(kind)
        return self._found[kind]

    def _written(self, dtype: str) -> ComparedFile:
        from transformers_patches.weights.gguf_writer import write_gguf

        path = self._folder / f"{dtype}.gguf"
        write_gguf(path, self._weights(), self._config, dtype)
        return _described(path, dtype, "the same weights")

    def _quantized(self, kind: str) -> ComparedFile:
        base = self._own if self._own is not None else self.file(self._dtype).path
        path = self._folder / f"{kind}.gguf"
        quantize(base, path, kind)
        again = f"quantised again from {base.name}" if self._own is not None else "quantised from the same weights"
        return _described(path, kind, f"{again}, no importance matrix")


def own_file(checkpoint: Path) -> Path | None:
    """The GGUF file that a checkpoint was unpacked from, if it was kept: <folder>.gguf, or the checkpoint itself."""
    if is_gguf(checkpoint):
        return checkpoint
    beside = checkpoint.with_name(f"{checkpoint.name}.gguf")
    return beside if beside.is_file() and is_gguf(beside) else None


def own_kind(config: PretrainedConfig, given: str | None = None) -> str:
    """The type of llama.cpp's that stands for a --dtype; for none, or `auto`, the type of the checkpoint's floats."""
    if given in (None, "auto"):
        return str(config.dtype or torch.float32).removeprefix("torch.")
    return SAME_BITS.get(given, given)


def file_kind(path: Path) -> str | None:
    """The type that a file says it is of; None if it is no key of QUANTIZED."""
    return _KINDS.get(read_gguf(path).metadata.get("general.file_type"))


def quantize(base: Path, path: Path, kind: str) -> None:
    """Write `base` in another type with llama.cpp's quantiser. Raises PartInferError if it fails."""
    import llama_cpp

    from evaluation.compared.library import silence

    silence()
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.allow_requantize = QUANTIZED[kind], os.cpu_count() or 1, True
    if llama_cpp.llama_model_quantize(str(base).encode(), str(path).encode(), ctypes.byref(options)):
        path.unlink(missing_ok=True)
        raise PartInferError(f"llama.cpp can't write {base.name} as {kind}: leave it out of --compare")


def _described(path: Path, kind: str, note: str) -> ComparedFile:
    tensors = read_gguf(path).tensors
    unread = tensors["token_embd.weight"].nbytes if "output.weight" in tensors else 0
    return ComparedFile(path, kind, note, sum(tensor.nbytes for tensor in tensors.values()) - unread)
