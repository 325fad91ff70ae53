"""What enters and leaves the linear layers of a model on some texts, with gradients of the loss at what leaves them.

The labels of the loss are drawn from the model's own predictions, so the mean of the squared gradients is the diagonal
of the Fisher information (not the empirical one, whose labels are the texts').
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from profiler.ladder.gradient_linear import GradientLinear
from transformers_patches.errors import PartInferError
from transformers_patches.families import Family, family_of
from transformers_patches.modules.fast_linear import FastLinear
from transformers_patches.neurons.byte_ladder import INPUTS

FFN = "ffn"  # as an output: of the whole FFN
TOKENS, LONGEST, KEPT = 1536, 320, 384  # tokens in all, of one text, and of those that options are tried on
_SKIPPED = 8  # tokens at the start of a text, whose activations are like no others


@dataclass
class LayerCapture:
    """One layer's part.

    inputs: [T, in] of some tokens, in the model's type, for the names in INPUTS.
    gradients: [T, out] of the same tokens, by the paths of the attention's projections in the layer, and FFN.
    input_sums: float32 [in], sums of the inputs over all tokens.
    square_sums: float32 [out], sums of the squared gradients over all tokens.
    tokens: how many are in the sums.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    input_sums: dict[str, torch.Tensor] = field(default_factory=dict)
    square_sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0


def shortened(sequences: list[list[int]]) -> list[list[int]]:
    """The first texts with TOKENS tokens together, of at most LONGEST each, that are long enough to be of use."""
    chosen, tokens = [], 0
    for ids in sequences:
        if len(ids) > 2 and tokens < TOKENS:
            chosen.append(ids[:LONGEST])
            tokens += len(chosen[-1])
    return chosen


def capture(
    model: PreTrainedModel, sequences: list[list[int]], *, seed: int = 0, quiet: bool = False
) -> list[LayerCapture]:
    """Run texts, one at a time, forwards and backwards; one LayerCapture for each layer.

    sequences: token ids, at least one text of three tokens. No gradients of weights are made.
    """
    family = family_of(model.config)
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(ids) - _skipped(ids) for ids in sequences]
    share = min(1.0, KEPT / sum(lengths))
    parts: list[list[LayerCapture]] = []
    asked = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with _gradient_linears(model), _watched(model, family) as seen:
            for ids, length in zip(tqdm(sequences, "gradients", unit=" texts", disable=quiet), lengths, strict=True):
                _backward(model, ids, generator)
                chosen = torch.randperm(length, generator=generator)[: max(1, round(share * length))] + _skipped(ids)
                parts.append([_part(layer, chosen, _skipped(ids)) for layer in seen])
                for layer in seen:
                    layer.clear()
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
    return [_joined(of_layer) for of_layer in zip(*parts, strict=True)]


def _skipped(ids: list[int]) -> int:
    return min(_SKIPPED, len(ids) // 2)


@torch.enable_grad()
def _backward(model: PreTrainedModel, ids: list[int], generator: torch.Generator) -> None:
    embedded = model.get_input_embeddings()(torch.tensor([ids], device=model.device)).detach().requires_grad_(True)
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
    if not bool(logits.isfinite().all()):
        raise PartInferError("no byte ladder: the model's predictions are not finite: use --dtype bfloat16 or float32")
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()


@contextmanager
def _gradient_linears(model: nn.Module) -> Iterator[None]:
    """Linear layers, whose kernels have no gradients or are slow, are GradientLinears meanwhile."""
    own = {name: module for name, module in model.named_modules() if isinstance(module, (FastLinear, nn.Linear))}
    for name, module in own.items():
        model.set_submodule(name, GradientLinear(module))
    try:
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


@contextmanager
def _watched(model: PreTrainedModel, family: Family) -> Iterator[list[dict]]:
    """Per layer, what one pass shows: (input, output) by the paths of the attention's projections, and FFN."""
    layers = family.decoder_layers(model)
    seen: list[dict] = [{} for _ in layers]
    hooks = []
    for number, layer in enumerate(layers):
        modules = {path: layer.get_submodule(path) for name in INPUTS[:2] for path in family.inputs()[name]}
        modules[FFN] = family.ffn_module(model, number)
        for name, module in modules.items():
            hooks.append(module.register_forward_hook(_hook(seen[number], name)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _hook(seen: dict, name: str):
    def look(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.retain_grad()
        seen[name] = args[0].detach()[0], output

    return look


def _part(seen: dict, chosen: torch.Tensor, skipped: int) -> LayerCapture:
    """What one text shows of a layer."""
    part = LayerCapture()
    paths = [path for path in seen if path != FFN]
    for name, path in zip(INPUTS, (paths[0], paths[-1], FFN), strict=True):  # q, k and v share their input
        values = seen[path][0]
        part.inputs[name] = values[chosen.to(values.device)].clone()
        part.input_sums[name] = values[skipped:].float().sum(0)
        part.tokens = len(values) - skipped
    for path, (_, output) in seen.items():
        gradient = output.grad[0]
        part.gradients[path] = gradient[chosen.to(gradient.device)].clone()
        part.square_sums[path] = gradient[skipped:].float().square().sum(0)
    return part


def _joined(parts: tuple[LayerCapture, ...]) -> LayerCapture:
    """One layer's parts of all texts as one."""
    first = parts[0]
    return LayerCapture(
        {name: torch.cat([part.inputs[name] for part in parts]) for name in first.inputs},
        {name: torch.cat([part.gradients[name] for part in parts]) for name in first.gradients},
        {name: sum(part.input_sums[name] for part in parts) for name in first.input_sums},
        {name: sum(part.square_sums[name] for part in parts) for name in first.square_sums},
        sum(part.tokens for part in parts),
    )
