"""WINA's change of basis: the model stays the same, and the columns of k and gate become orthogonal (arXiv 2505.19427).

The paper's choice of inputs is the best one for a weight W whose columns are orthogonal. With W = U S Vᵀ the columns of
W V are. So the weights g of a norm are folded into the projections that read it, and these are turned: q, k and v by the V
of k, gate and up by the V of gate. To take x into the same basis the paper turns the residual stream, and puts a product
with V_nowᵀ V_next into each shortcut. Here the residual stream stays, and each norm's output is turned instead: as many
products, and the same inputs and weights wherever something is left out.
"""

from __future__ import annotations

import torch
from torch import nn

from evaluation.published.projections import LayerParts, float_weight
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.modules.quantized import weight_of

ORTHOGONAL = ("k", "gate")  # the projections whose columns become orthogonal
_READERS = {"k": ("q", "k", "v"), "gate": ("gate", "up")}  # of the same norm


def rotate(layers: list[LayerParts]) -> None:
    """Turn the inputs of q, k, v, gate and up of all layers, in place. Raises PartInferError for quantised weights."""
    for parts in layers:
        for basis, norm in zip(ORTHOGONAL, (parts.attention_norm, parts.ffn_norm), strict=True):
            _turn(norm, parts.norm_offset, [parts.projections[name] for name in _READERS[basis]], basis, parts)


def right_singular_vectors(weight: torch.Tensor) -> torch.Tensor:
    """V [in, in] of weight [out, in], in float64; with fewer rows than columns, completed to a basis."""
    return torch.linalg.svd(weight.double(), full_matrices=weight.shape[0] < weight.shape[1]).Vh.T.contiguous()


def _turn(norm: nn.Module, offset: float, readers: list[nn.Module], basis: str, parts: LayerParts) -> None:
    """Fold a norm's weights into the projections that read it, and turn these and what they read."""
    if any(isinstance(weight_of(reader.weight), QuantizedTensor) for reader in readers):
        raise PartInferError(
            "wina turns weights, which quantised ones can't be: give --dtype bfloat16, or use wina_plain"
        )
    scale = norm.weight.detach().double() + offset
    turn = right_singular_vectors(float_weight(parts.projections[basis]).double() * scale)
    for reader in readers:
        weight = (reader.weight.detach().double() * scale) @ turn
        reader.weight = nn.Parameter(weight.to(reader.weight.dtype), requires_grad=False)
    norm.weight = nn.Parameter(torch.full_like(norm.weight, 1 - offset), requires_grad=False)
    single = turn.float()
    norm.register_forward_hook(lambda _module, _inputs, output: (output.float() @ single).to(output.dtype))
