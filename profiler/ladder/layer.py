"""One layer's weights and tokens in float32, and the means and norms by which its inputs are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from profiler.ladder.capture import FFN, LayerCapture
from transformers_patches.families import family_of
from transformers_patches.neurons.byte_ladder import INPUTS

# Of the weights of a norm's rows, how much all have alike: gradients of few texts say little about a single output.
_ALIKE = 0.3
_LARGEST = 6e4  # what 16 bits hold


@dataclass
class Tokens:
    """What is known of T tokens where an input can be left out.

    deviation: float32 [T, in], x - mean.
    pull: float32 [T, in], the derivative of the loss by each input, through the layer's weights only.
    """

    deviation: torch.Tensor
    pull: torch.Tensor

    @property
    def kept_out(self) -> torch.Tensor:
        """float32 [T, in]: by how much the loss changes, to first order, if an input counts as its mean."""
        return -self.deviation * self.pull


@dataclass
class FFNTokens:
    """What is known of T tokens in an FFN. All [T, N] but for `x`."""

    x: torch.Tensor  # [T, in]
    gate: torch.Tensor  # act(gate x)
    up: torch.Tensor  # up x, of all inputs
    pull: torch.Tensor  # the derivative of the loss by each activation h


@dataclass
class FloatLayer:
    """One decoder layer, ready to try options on.

    mean, norm: [in] by the names in INPUTS, in the type in which a ladder keeps them.
    attention, attention_output: the tokens at q, k, v and at o.
    ffn: the tokens in the FFN.
    up: float32 [N, in]; up_bias: float32 [N] or None.
    gate_size: float32 [N], root mean square of act(gate x).
    down_norm: float32 [N], ||W_down[:, i]||.
    weights: how many the projections have, by `attention`, `attention_output` and `matrix` (one of the FFN's three).
    """

    mean: dict[str, torch.Tensor]
    norm: dict[str, torch.Tensor]
    attention: Tokens
    attention_output: Tokens
    ffn: FFNTokens
    up: torch.Tensor
    up_bias: torch.Tensor | None
    gate_size: torch.Tensor
    down_norm: torch.Tensor
    weights: dict[str, int]


def float_layer(model: PreTrainedModel, number: int, seen: LayerCapture) -> FloatLayer:
    """Prepare one layer of a gated family."""
    family = family_of(model.config)
    layer, ffn = family.decoder_layers(model)[number], family.ffn_module(model, number)
    mean = {name: _kept(seen.input_sums[name] / seen.tokens) for name in INPUTS}
    fisher = {path: squares / seen.tokens for path, squares in seen.square_sums.items()}
    inputs, norm, tokens, weights = family.inputs(), {}, {}, {}
    for name in INPUTS[:2]:
        linears = {path: layer.get_submodule(path) for path in inputs[name]}
        floats = {path: linear.weight.float() for path, linear in linears.items()}
        norms = [column_norms(weight, fisher[path]) * fisher[path].mean().sqrt() for path, weight in floats.items()]
        norm[name] = _kept(scaled(torch.stack(norms).norm(dim=0)))
        pull = sum(seen.gradients[path].float() @ weight for path, weight in floats.items())
        tokens[name] = Tokens(seen.inputs[name].float() - mean[name].float(), pull)
        weights[name] = sum(weight.numel() for weight in floats.values())
    x = seen.inputs["ffn"].float()
    gate = getattr(ffn, family.activation_module)(_applied(getattr(ffn, family.gate), x))
    down = getattr(ffn, family.down).weight.float()
    gate_size, up = gate.square().mean(0).sqrt(), getattr(ffn, family.up)
    pull = seen.gradients[FFN].float() @ down
    important = (gate_size * column_norms(down, fisher[FFN])).square()
    up_weight = up.weight.float()
    norm["ffn"] = _kept(scaled(column_norms(up_weight, important, alike=0.0)))
    bias = None if up.bias is None else up.bias.float()
    weights["matrix"] = up_weight.numel()
    return FloatLayer(
        mean=mean,
        norm=norm,
        attention=tokens["attention"],
        attention_output=tokens["attention_output"],
        ffn=FFNTokens(x, gate, nn.functional.linear(x, up_weight, bias), pull),
        up=up_weight,
        up_bias=bias,
        gate_size=gate_size,
        down_norm=down.norm(dim=0),
        weights=weights,
    )


def column_norms(weight: torch.Tensor, importance: torch.Tensor, alike: float = _ALIKE) -> torch.Tensor:
    """float32 [in]: norms of a weight's columns, its rows weighted by how much an output matters.

    weight: [out, in]. importance: [out], of any scale; `alike` is the part of it that all rows have in common.
    """
    relative = importance / importance.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (weight.square() * ((1 - alike) * relative + alike)[:, None]).sum(0).sqrt()


def scaled(norms: torch.Tensor) -> torch.Tensor:
    """Norms with a mean of 1; thresholds scale with them."""
    return norms / norms.mean().clamp(min=torch.finfo(torch.float32).tiny)


def _kept(values: torch.Tensor) -> torch.Tensor:
    """In 16 bits, where they hold them."""
    return values.half() if float(values.abs().max()) < _LARGEST else values.float()


def _applied(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """A linear layer in float32."""
    return nn.functional.linear(x, linear.weight.float(), None if linear.bias is None else linear.bias.float())
