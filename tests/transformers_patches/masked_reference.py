"""An independent reference: plain transformers models whose FFN activations are masked, and formulas written naively.

Nothing here uses the project's code: the FFNs are found by the names that transformers gives their projections, the
counts, plans and selections are Python loops over the method's formulas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

DOWN_PROJECTION = re.compile(r"layers\.(\d+)\.(?:mlp\.down_proj|fc2)$")


def naive_count(fraction: float, size: int) -> int:
    """Round half to even of fraction * size, at least 1."""
    product = fraction * size
    whole = int(product)
    rest = product - whole
    if rest > 0.5 or (rest == 0.5 and whole % 2 == 1):
        whole += 1
    return max(whole, 1)


def naive_plan(base_ranking: list[int], other_ranking: list[int], delta: float, gamma: float) -> list[int]:
    """The loaded neurons of a layer: the base first, then what the other ranking has best and is not yet in."""
    size = len(base_ranking)
    loaded = list(base_ranking[: naive_count(delta, size)])
    for neuron in other_ranking:
        if len(loaded) == naive_count(gamma, size):
            break
        if neuron not in loaded:
            loaded.append(neuron)
    return loaded


def naive_core_counts(h: list[list[float]], alpha: float) -> list[int]:
    """How many tokens mark each neuron; h: tokens x neurons of one prompt, without padding."""
    mean_positives = Fraction(sum(value > 0 for token in h for value in token), len(h))
    k = int(Fraction(str(alpha)) * mean_positives)
    counts = [0] * len(h[0])
    for token in h:
        for neuron in sorted(range(len(token)), key=lambda i: -token[i])[:k]:
            if token[neuron] > 0:  # an activation that is not positive is nobody's core neuron
                counts[neuron] += 1
    return counts


def naive_selection(counts: dict[int, int], base_ranking: list[int], base: list[int], computed: int) -> set[int]:
    """The neurons that decoding computes: the base, and the most marked others, ties by the base ranking."""
    others = sorted((n for n in counts if n not in base), key=lambda n: (-counts[n], base_ranking.index(n)))
    return set(base) | set(others[: computed - len(base)])


class MaskedReference:
    """A plain transformers model in float32, each of whose FFN activations can be masked per layer and sequence.

    masks: layer -> float [1 or B, 1, N], what the activations are multiplied by; seen: layer -> list of float
    [B, T, N], the activations of each pass since `seen` was emptied, before masking.
    """

    def __init__(self, folder: Path, down: re.Pattern = DOWN_PROJECTION, with_experts: int = 0) -> None:
        """down: of the output projections' names, with the layer's number as a group.
        with_experts: how many layers have a mixture of experts instead.
        """
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.masks: dict[int, torch.Tensor] = {}
        self.seen: dict[int, list[torch.Tensor]] = {}
        self._batch = 1
        layers = 0
        for name, module in self.model.named_modules():
            if match := down.search(name):
                self._width = module.in_features
                module.register_forward_pre_hook(self._hook(int(match[1])))
                layers += 1
        assert layers == self.model.config.num_hidden_layers - with_experts

    def _hook(self, layer: int):
        def mask_activations(module, args):
            (h,) = args
            per_sequence = h.reshape(self._batch, -1, h.shape[-1])  # OPT's fc2 sees [B*T, N]
            self.seen.setdefault(layer, []).append(per_sequence)
            if layer in self.masks:
                return ((per_sequence * self.masks[layer]).reshape(h.shape),)
            return None

        return mask_activations

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, **kwargs):
        self._batch = len(input_ids)
        return self.model(input_ids=input_ids, use_cache=True, **kwargs)

    def mask(self, layer: int, *neurons: set[int] | list[int]) -> None:
        """Keep these neurons of a layer: one collection for every sequence, or one for each."""
        mask = torch.zeros(len(neurons), 1, self.size)
        for row, kept in enumerate(neurons):
            mask[row, 0, list(kept)] = 1
        self.masks[layer] = mask

    @property
    def size(self) -> int:
        return self._width

    @contextmanager
    def fresh(self) -> Iterator[MaskedReference]:
        """No masks and nothing seen, before and after."""
        self.masks, self.seen = {}, {}
        try:
            yield self
        finally:
            self.masks, self.seen = {}, {}


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids of tokens behind padding."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@dataclass
class NaiveMethod:
    """A method's settings in plain Python."""

    method: str
    partial: bool  # whether gamma applies
    base_ranking: list[list[int]]  # of each layer, neurons best first
    other_ranking: list[list[int]]
    layers: range
    delta: float = 0.3
    phi: float = 0.4
    gamma: float = 0.7
    alpha: float = 0.2

    def loaded(self, layer: int) -> list[int]:
        size = len(self.base_ranking[layer])
        if not self.partial:
            return list(range(size))
        return naive_plan(self.base_ranking[layer], self.other_ranking[layer], self.delta, self.gamma)

    def base(self, layer: int) -> list[int]:
        if self.method != "partinfer":
            return []
        return self.base_ranking[layer][: naive_count(self.delta, len(self.base_ranking[layer]))]

    def prefill(self, reference: MaskedReference, chunks: list[tuple[torch.Tensor, dict]], cache=None):
        """Run (input_ids, kwargs) of a prompt with the loaded neurons only; the last pass's output.

        Every kwargs holds `attention_mask`, [B, cached + tokens]. Given a cache, the prompt follows the ones before
        it, and what those marked counts too. Afterwards the masks are those of decoding.
        """
        for layer in self.layers:
            reference.mask(layer, self.loaded(layer))
        if cache is None:
            self.counts = {layer: [[0] * len(self.loaded(layer)) for _ in chunks[0][0]] for layer in self.layers}
        for input_ids, kwargs in chunks:
            reference.seen = {}
            output = reference(input_ids, past_key_values=cache, **kwargs)
            cache = output.past_key_values
            for layer in self.layers:
                self._count(self.counts[layer], reference.seen[layer][0], layer, kwargs["attention_mask"])
        self.selected = {layer: self._select(self.counts[layer], layer) for layer in self.layers}
        for layer in self.layers:
            reference.mask(layer, *self.selected[layer])
        return output

    def _count(self, counts: list[list[int]], h: torch.Tensor, layer: int, attention_mask: torch.Tensor) -> None:
        real = attention_mask[:, -h.shape[1] :].bool()
        for sequence, activations in enumerate(h):
            prompt = activations[real[sequence]][:, self.loaded(layer)]
            if len(prompt):
                marks = naive_core_counts(prompt.tolist(), self.alpha)
                counts[sequence] = [a + b for a, b in zip(counts[sequence], marks, strict=True)]

    def _select(self, counts: list[list[int]], layer: int) -> list[set[int]]:
        loaded = self.loaded(layer)
        if self.method == "dense":
            return [set(loaded) for _ in counts]
        computed = naive_count(self.phi, len(self.base_ranking[layer]))
        return [
            naive_selection(dict(zip(loaded, row, strict=True)), self.base_ranking[layer], self.base(layer), computed)
            for row in counts
        ]
