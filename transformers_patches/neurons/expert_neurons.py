"""ExpertNeurons: what a profile says about the neurons of experts, and which of them to load.

M layers with experts, E experts in each, N neurons in each expert.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from transformers_patches.errors import PartInferError
from transformers_patches.neurons.checks import WHOLE_NUMBERS, check_floats, shown

# Means over the tokens that the router sent to the expert, of abs(h), and the root of that of h^2; ||W_down[:, i]||_2.
STATISTICS = ("mean_abs", "rms", "down_norm")
SCORES = ("mean_abs", "rms", "mean_abs_down", "rms_down")
LEAST_TOKENS = 16  # from which an expert's ranking is its own; below, its neurons are ranked by down_norm
LEAST_SHARE = 1 / 32  # of its neurons, which an expert keeps however little it is used
LARGEST = 65504.0  # of float16
_WEIGHTED = "_down"


@dataclass(frozen=True)
class ExpertNeurons:
    """Statistics of the experts of a model.

    layers: the M layers that have experts, rising.
    tokens: int64 [M, E], how many tokens the router sent to each.
    statistics: float16 [M, E, N], for names in STATISTICS.
    """

    layers: tuple[int, ...]
    tokens: torch.Tensor
    statistics: dict[str, torch.Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, E, N."""
        return tuple(self.statistics[STATISTICS[0]].shape)

    @property
    def unknown(self) -> int:
        """How many experts saw too few tokens for a ranking of their own."""
        return int((self.tokens < LEAST_TOKENS).sum())

    def scores(self, score: str) -> torch.Tensor:
        """float32 [M, E, N]. score: of SCORES; others fall back to mean_abs, with the norms of down if they have them."""
        name = score if score in SCORES else "mean_abs" + (_WEIGHTED if score.endswith(_WEIGHTED) else "")
        values = self.statistics[name.removesuffix(_WEIGHTED)].float()
        norms = self.statistics["down_norm"].float()
        values = values * norms if name.endswith(_WEIGHTED) else values
        return torch.where((self.tokens < LEAST_TOKENS)[..., None], norms, values)

    def loaded(self, layer: int, share: float, score: str) -> list[torch.Tensor]:
        """Which neurons of each expert of a layer to load, so that a share of all of them is: E times int64, rising.

        An expert's order is by score. How many it gets goes by use: the activations that its best n neurons have over
        all tokens of the profile, tokens x mean_abs x down_norm. The layer's neurons with the most of that are loaded,
        and LEAST_SHARE of every expert, so experts that are hardly used give up theirs first.
        """
        place = self.layers.index(layer)
        _, count, size = self.shape
        if share >= 1:
            return [torch.arange(size)] * count
        order = self.scores(score)[place].argsort(dim=1, descending=True, stable=True)  # [E, N]
        mass = self.statistics["mean_abs"][place].double() * self.statistics["down_norm"][place].double()
        mass = mass.gather(1, order) * self.tokens[place, :, None]
        room = max(count, round(share * count * size))
        least = max(1, min(round(LEAST_SHARE * size), room // count))
        counts = torch.full((count,), least)
        best = mass[:, least:].flatten().argsort(descending=True, stable=True)[: room - least * count]
        counts += torch.bincount(best // max(1, size - least), minlength=count)
        return [order[expert, : int(number)].sort().values for expert, number in enumerate(counts)]

    def check(self, num_layers: int, source: str) -> None:
        """Raise PartInferError unless these are statistics of experts in some of as many layers."""
        shapes = {tuple(values.shape) for values in self.statistics.values()}
        whole = self.statistics.keys() == set(STATISTICS) and len(shapes) == 1 and len(min(shapes)) == 3
        rising = list(self.layers) == sorted(set(self.layers)) and all(0 <= layer < num_layers for layer in self.layers)
        counted = self.tokens.dtype in WHOLE_NUMBERS and self.tokens.numel() and int(self.tokens.min()) >= 0
        if not (whole and rising and counted and (len(self.layers), self.tokens.shape[1]) == min(shapes)[:2]):
            raise PartInferError(f"{source}: what it says about experts is damaged: make the file again")
        for name, values in self.statistics.items():
            check_floats(values, f"experts.{name}", source)
            if values.numel() and float(values.min()) < 0:
                raise PartInferError(f"{source}: experts.{name} has numbers below 0: make the file again")

    def as_stored(self) -> ExpertNeurons:
        """The same in the types of files."""
        halves = {name: values.clamp(max=LARGEST).half() for name, values in self.statistics.items()}
        return ExpertNeurons(self.layers, self.tokens.long(), halves)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"tokens": self.tokens, **self.statistics}

    def described(self) -> str:
        """What is not in the tensors, as JSON."""
        return json.dumps(list(self.layers))

    @classmethod
    def read(cls, described: str, tensors: dict[str, torch.Tensor], source: str) -> ExpertNeurons:
        """From a file's metadata and tensors; PartInferError if they are damaged."""
        try:
            layers = json.loads(described)
        except (ValueError, RecursionError):
            layers = None
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers) or "tokens" not in tensors:
            raise PartInferError(f"{source}: its layers with experts are {shown(described)}: make the file again")
        return cls(tuple(layers), tensors["tokens"], {name: v for name, v in tensors.items() if name != "tokens"})


def merged(parts: list[ExpertNeurons], weights: list[float], totals: list[int], source: str) -> ExpertNeurons:
    """Experts over several data sets. weights: of the data sets; totals: their tokens.

    An expert's means are those over its tokens, each data set's counted as often as its weight says. PartInferError if
    they are of different models.
    """
    first = parts[0]
    if any((part.layers, part.shape) != (first.layers, first.shape) for part in parts):
        raise PartInferError(f"{source}: merge files of one model")
    uses = torch.stack(
        [
            part.tokens.double() * (weight / max(1, total))
            for part, weight, total in zip(parts, weights, totals, strict=True)
        ]
    )
    shares = (uses / uses.sum(0).clamp(min=1e-300))[..., None]  # [files, M, E, 1]

    def mean(name: str, power: int) -> torch.Tensor:
        values = torch.stack([part.statistics[name].double() ** power for part in parts])
        return (shares * values).sum(0) ** (1 / power)

    statistics = {
        "mean_abs": mean("mean_abs", 1),
        "rms": mean("rms", 2),
        "down_norm": first.statistics["down_norm"],
    }
    return ExpertNeurons(first.layers, torch.stack([part.tokens for part in parts]).sum(0), statistics).as_stored()
