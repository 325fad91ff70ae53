"""GGUF files of the families in `families.py`: which one a file is of, and the biases that such files may lack."""

from __future__ import annotations

import re

from gguf import GGMLQuantizationType

from transformers_patches.errors import PartInferError
from transformers_patches.families import FAMILIES, Family, gguf_family
from transformers_patches.weights.gguf_architectures import ARCHITECTURES, REFUSED
from transformers_patches.weights.gguf_file import GGUFFile, StoredTensor
from transformers_patches.weights.gguf_schema import Metadata

_ATTENTION_INPUTS = ("attn_q", "attn_k", "attn_v")
_FFN = ("ffn_gate", "ffn_up", "ffn_down")


def family_of(metadata: Metadata) -> Family:
    """The family of a file's architecture; PartInferError if it has no entry, which says what can be read."""
    architecture = metadata.architecture[:80]
    if architecture in REFUSED:
        raise PartInferError(
            f"{metadata.file.path}: GGUF files of {architecture} can't be read: {REFUSED[architecture]}"
        )
    try:
        return gguf_family(architecture)
    except PartInferError:
        known = sorted({*ARCHITECTURES, *(family.gguf.architecture for family in FAMILIES.values() if family.gguf)})
        raise PartInferError(
            f"{metadata.file.path} can't be read: unknown GGUF architecture {architecture!r}; known are "
            f"{', '.join(known)}: give a Family in transformers_patches/families.py its `gguf`, or add it to "
            "transformers_patches/weights/gguf_architectures.py"
        ) from None


def biased_together(file: GGUFFile, architecture: str) -> list[tuple[str, ...]]:
    """Groups of a block's projections that have biases in the transformers model: if one of a group has, all have.

    llama.cpp adds those that are there. Qwen 2 always has those of its attention inputs; only Llamas may have some in
    their FFNs.
    """
    if architecture == "qwen2":
        return [_ATTENTION_INPUTS]
    groups = [(*_ATTENTION_INPUTS, "attn_output"), *([_FFN] if architecture == "llama" else [])]
    biased = {name.split(".")[2] for name in file.tensors if re.fullmatch(r"blk\.\d+\.\w+\.bias", name)}
    return [group for group in groups if biased & set(group)]


def missing_biases(file: GGUFFile, architecture: str) -> list[StoredTensor]:
    """Biases of `biased_together` that the file lacks, which are 0."""
    missing = []
    for group in biased_together(file, architecture):
        for tensor in file.tensors.values():
            match = re.fullmatch(r"blk\.\d+\.(\w+)\.weight", tensor.name)
            bias = tensor.name.removesuffix("weight") + "bias"
            if match and match[1] in group and bias not in file.tensors:
                kind = GGMLQuantizationType.F32
                missing.append(StoredTensor(tensor.path, bias, tensor.shape[:1], kind, 0, 0))
    return missing
