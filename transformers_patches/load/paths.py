"""Which path each layer of a loaded model takes when a token is decoded."""

from __future__ import annotations

from collections import Counter

from torch import nn
from transformers import PreTrainedModel

from transformers_patches.families import family_of
from transformers_patches.fast_pass.one_token import one_token_pass
from transformers_patches.sparse.cut_ffn import CutFFN
from transformers_patches.sparse.experts import Experts
from transformers_patches.sparse.sparse_ffn import SparseFFN
from transformers_patches.sparse.zeros_ffn import ZerosFFN

DECODER = "native decoder"
FFN = "native FFN"
EXPERTS = "native experts"
LINEAR = "native linear layers"
TORCH = "PyTorch"


def layer_paths(model: PreTrainedModel, *, native: bool) -> list[str]:
    """For each layer, the most of it that runs natively: DECODER, FFN or EXPERTS (attention is transformers'), LINEAR
    or TORCH.

    native: whether the native kernels decode.
    """
    if not native:
        return [TORCH] * model.config.num_hidden_layers
    step = one_token_pass(model)
    if step is not None:
        parts = ((part.dense is not None, part.sparse) for part in step.layers)
        return [DECODER if dense or _is_native(sparse) else LINEAR for dense, sparse in parts]
    layers = family_of(model.config).decoder_layers(model)
    return [_path_of(layer) for layer in layers]


def _path_of(layer: nn.Module) -> str:
    """Of a layer whose attention is transformers' own."""
    for module in layer.modules():
        if isinstance(module, Experts) and module.native_activation is not None:
            return EXPERTS
        if isinstance(module, CutFFN | ZerosFFN):
            return FFN if module.rows.kernel_activation is not None else LINEAR
        if isinstance(module, SparseFFN):
            return FFN if _is_native(module) else LINEAR
    return LINEAR


def _is_native(ffn: SparseFFN | None) -> bool:
    return ffn is not None and ffn.rows.kernel_activation is not None


def in_words(paths: list[str]) -> str:
    """Such as `28 layers: native decoder`."""
    return ", ".join(f"{count} layers: {path}" for path, count in Counter(paths).items())
