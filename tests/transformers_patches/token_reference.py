"""An independent reference of choosing per token and of compensation, on plain transformers models.

As in masked_reference, nothing of the project's code is used: projections are found by transformers' names, the
formulas are written out per sequence and token.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.transformers_patches.masked_reference import DOWN_PROJECTION, MaskedReference

INPUT = re.compile(r"layers\.(\d+)\.(?:mlp\.(gate|up)_proj|fc1)$")


class TokenReference(MaskedReference):
    """MaskedReference whose layers keep, in decoding, the best neurons of every token.

    by: `up` or `gate` (a plain FFN has one input projection); loaded, kept: layer -> loaded neurons, how many of them a
    token keeps (a layer that is in neither has its mask); bias: layer -> what is added to the output, [H].
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.inputs: dict[tuple[int, str], torch.Tensor] = {}
        self.by, self.decoding = "up", False
        self.loaded: dict[int, list[int]] = {}
        self.kept: dict[int, int] = {}
        self.prior: dict[int, torch.Tensor] = {}  # typical size by neuron, as the fit file has it
        self.bias: dict[int, torch.Tensor] = {}
        self.real: torch.Tensor | None = None  # bool [B, T] of the prompt
        self.down = {}
        for name, module in self.model.named_modules():
            if match := INPUT.search(name):
                module.register_forward_hook(self._save(int(match[1]), match[2] or "up"))
            if match := DOWN_PROJECTION.search(name):
                self.down[int(match[1])] = module
                module.register_forward_hook(self._add_bias(int(match[1])))

    def _save(self, layer: int, name: str):
        def save(module, args, output):
            self.inputs[layer, name] = output.reshape(self._batch, -1, output.shape[-1])

        return save

    def _add_bias(self, layer: int):
        def add(module, args, output):
            return output + self.bias[layer] if layer in self.bias else None

        return add

    def _hook(self, layer: int):
        by_mask = super()._hook(layer)

        def keep(module, args):
            if layer not in self.loaded:
                return by_mask(module, args)
            h = args[0].reshape(self._batch, -1, args[0].shape[-1])
            mask = torch.zeros_like(h)
            mask[..., self.loaded[layer]] = 1
            # h = act(gate) up: the activation is what h is in units of up
            gated = (layer, "gate") in self.inputs
            up = self.inputs[layer, "up"] if gated else h
            act = h / up if gated else h
            if not self.decoding:
                self._observe(layer, act if self.by == "up" else up, h)
            else:
                mask *= self._best(layer, up if self.by == "up" else act, h)
            return ((h * mask).reshape(args[0].shape),)

        return keep

    def _observe(self, layer: int, values: torch.Tensor, h: torch.Tensor) -> None:
        self.sizes = getattr(self, "sizes", {})
        plain = (layer, "gate") not in self.inputs
        loaded, result = self.loaded[layer], []
        for sequence in range(len(values)):
            tokens = values[sequence][self.real[sequence]]
            squares = tokens.square().sum(0)
            if layer in self.prior and self.by == "up":
                size = ((squares + 256 * self.prior[layer] ** 2) / (len(tokens) + 256)).sqrt()
            else:
                size = ((squares + squares[loaded].mean() / len(tokens)) / (len(tokens) + 1)).sqrt()
            result.append(torch.ones_like(size) if plain else size)
        self.sizes[layer] = result

    def _best(self, layer: int, values: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(h)
        norms = self.down[layer].weight.float().norm(dim=0)
        loaded = self.loaded[layer]
        for sequence in range(len(h)):
            for token in range(h.shape[1]):
                score = values[sequence, token].abs() * self.sizes[layer][sequence] * norms
                ranked = sorted(loaded, key=lambda neuron: -float(score[neuron]))  # noqa: B023
                mask[sequence, token, ranked[: self.kept[layer]]] = 1
        return mask

    def run(self, all_passes) -> list[torch.Tensor]:
        """Logits of the prompt's pass and of decode passes over its cache."""
        cache, logits = None, []
        for number, (input_ids, kwargs) in enumerate(all_passes):
            self.decoding = number > 0
            if number == 0:
                self.real = kwargs["attention_mask"].bool()
            output = self(input_ids, past_key_values=cache, **kwargs)
            cache = output.past_key_values
            logits.append(output.logits)
        return logits
