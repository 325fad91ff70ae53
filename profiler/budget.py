"""How to spread one budget for the whole model over its layers: gamma and phi of each.

The loss of a layer at (gamma, phi) is estimated as s E(gamma, phi). E is the energy missing from the layer's output,
neuron by neuron: the variance of h_i times |d_i|^2 for neurons that are not candidates, and the mean of h_i^2 |d_i|^2
for candidates that the selection skips. s is measured: the KL divergence of the model's predictions when only this
layer is sparse, divided by E. A greedy search then takes bytes where they cost least, as knapsack heuristics do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from profiler.layerwise import Batch, FFNWeights, LayerwiseModel
from profiler.simulation import Counts, SimulatedSelection
from transformers_patches.config import neuron_count
from transformers_patches.plan.load_plan import candidate_count, kept_count

STEP = 0.05
LOWEST = 0.3  # no layer loads a smaller share of its neurons, or reads a smaller share of its bytes
SAMPLE_TOKENS = 2048
ENERGY_TOKENS = 256  # tokens of the sample whose energies and scores are kept for every layer


@dataclass(frozen=True)
class Share:
    """A layer's part of the budget."""

    loaded: float  # gamma: fraction of the FFN's bytes that is loaded
    sparsity: float  # phi: fraction of the FFN's bytes that a decoded token reads


@dataclass(frozen=True)
class MissingEnergy:
    """E(gamma, phi) of a layer."""

    mean_abs: torch.Tensor  # float [N]: mean |h|
    ranking: torch.Tensor  # int64 [N]: neurons by the variance of what they write, largest first
    unloaded: torch.Tensor  # float [N + 1]: the energy missing if only the first n of `ranking` are candidates, by n
    squares: torch.Tensor  # float [T, N]: h_i^2 |d_i|^2 for a sample of tokens, neurons in the order of `ranking`
    scores: torch.Tensor  # float [T, N]: the scores by which a token selects neurons, in the same order
    matrices: int  # 3 if the FFN is gated, 2 if it is plain

    @classmethod
    def of(cls, weights: FFNWeights, x: torch.Tensor) -> MissingEnergy:
        """Measure a layer on a sample of its FFN's inputs, x [T, H]."""
        h, up, gate = (None if v is None else v.float() for v in weights.activations(x))
        energy = weights.down.float().square().sum(1)
        variance = (h - h.mean(0)).square().mean(0) * energy
        ranking = variance.argsort(descending=True)
        left = variance[ranking].flip(0).cumsum(0).flip(0)
        scores = h.abs() if gate is None else up.abs() * gate.square().mean(0).sqrt()
        some = slice(None, None, max(1, len(h) // ENERGY_TOKENS))
        return cls(
            h.abs().mean(0),
            ranking,
            torch.cat([left, left.new_zeros(1)]),
            (h[some].square() * energy)[:, ranking],
            (scores[some] * energy.sqrt())[:, ranking],
            2 if gate is None else 3,
        )

    def at(self, share: Share) -> float:
        """E at a share. The candidates are assumed to be the first of `ranking`, whatever the prompt."""
        counts = self.counts(share)
        missing, among = float(self.unloaded[counts.candidates]), counts.candidates
        if counts.kept < among:
            best = self.scores[:, :among].topk(counts.kept, dim=1, sorted=False).indices
            squares = self.squares[:, :among]
            missing += float((squares.sum(1) - squares.gather(1, best).sum(1)).mean())
        return missing

    def counts(self, share: Share) -> Counts:
        """How many neurons the layer loads, chooses among and computes at a share."""
        size = len(self.ranking)
        loaded = min(neuron_count(share.loaded, size), size)
        candidates = candidate_count(share.sparsity, loaded, size)
        return Counts(loaded, candidates, kept_count(share.sparsity, candidates, size, self.matrices), 0)


def spread_budget(
    model: LayerwiseModel, batches: list[Batch], total_loaded: float, total_read: float, start: Share
) -> dict[int, Share]:
    """The share of every layer that is not loaded and computed whole.

    total_loaded, total_read: the budgets, as sums of `loaded` and `sparsity` over all layers of the model
    start: the uniform share at which every layer's sensitivity is measured
    """
    return allocate(_measure(model, _sample(batches), start), total_loaded, total_read)


def _sample(batches: list[Batch]) -> list[Batch]:
    """Single sequences, spread evenly over the batches, that together have about SAMPLE_TOKENS tokens."""
    rows = [(batch, row) for batch in batches for row in range(len(batch.ids))]
    mean = sum(int(batch.real.sum()) for batch in batches) / len(rows)
    step = max(1, int(len(rows) * mean / SAMPLE_TOKENS))
    sample = []
    for batch, row in rows[step // 2 :: step]:
        length = int(batch.real[row].sum())
        sample.append(Batch(*(values[row : row + 1, :length] for values in (batch.ids, batch.prompt, batch.decoded))))
    return sample


def allocate(losses: dict[int, Loss], total_loaded: float, total_read: float) -> dict[int, Share]:
    """Shares in multiples of STEP. Starts from whole layers and takes the step that costs least per byte until both
    budgets are met."""
    grid = {layer: Share(1.0, 1.0) for layer in losses}

    def excess() -> tuple[float, float]:
        loaded = sum(share.loaded for share in grid.values()) - total_loaded
        return loaded, sum(share.sparsity for share in grid.values()) - total_read

    while max(excess()) > STEP / 2:
        over_loaded, over_read = (value > STEP / 2 for value in excess())
        best = None
        for layer, share in grid.items():
            here = losses[layer].at(share)
            for step in _steps(share, over_loaded=over_loaded, over_read=over_read):
                gained = (share.loaded - step.loaded) * over_loaded + (share.sparsity - step.sparsity) * over_read
                cost = (losses[layer].at(step) - here) / gained
                if best is None or cost < best[0]:
                    best = (cost, layer, step)
        if best is None:
            break
        grid[best[1]] = best[2]
    return {layer: share for layer, share in grid.items() if share != Share(1.0, 1.0)}


def _steps(share: Share, *, over_loaded: bool, over_read: bool) -> list[Share]:
    less_loaded, less_read = round(share.loaded - STEP, 2), round(share.sparsity - STEP, 2)
    steps = []
    if over_loaded and less_loaded >= LOWEST:
        steps.append(Share(less_loaded, min(share.sparsity, less_loaded)))
    if over_read and less_read >= LOWEST:
        steps.append(Share(share.loaded, less_read))
    return steps


@dataclass
class Loss:
    """s E(gamma, phi) of a layer. Values are cached: the greedy search asks for the same ones many times."""

    energy: MissingEnergy  # E of the layer
    sensitivity: float  # s of the layer

    def __post_init__(self) -> None:
        self._known: dict[Share, float] = {}

    def at(self, share: Share) -> float:
        if share not in self._known:
            self._known[share] = 0.0 if share == Share(1.0, 1.0) else self.sensitivity * self.energy.at(share)
        return self._known[share]


@torch.no_grad()
def _measure(model: LayerwiseModel, sample: list[Batch], start: Share) -> dict[int, Loss]:
    count = model.model.config.num_hidden_layers
    hidden = [[model.inputs(batch) for batch in sample]]  # inputs of every layer, then the outputs of the last
    for layer in range(count):
        hidden.append([model.run(layer, values) for values in hidden[-1]])
    expected = [model.log_probabilities(batch, values) for batch, values in zip(sample, hidden[-1], strict=True)]
    losses = {}
    for layer in range(count):
        weights = FFNWeights.of(model.model, layer)
        inputs = [model.ffn_input(layer, values) for values in hidden[layer]]
        real = torch.cat([x[batch.real.flatten()] for batch, x in zip(sample, inputs, strict=True)])
        energy = MissingEnergy.of(weights, real.to(weights.down.device))
        outputs = _sparse_outputs(weights, energy, energy.counts(start), sample, inputs)
        divergence = tokens = 0.0
        for number, batch in enumerate(sample):
            with model.ffn_replaced(layer, lambda _, output=outputs[number]: output):
                values = model.run(layer, hidden[layer][number])
            for above in range(layer + 1, count):
                values = model.run(above, values)
            theirs = model.log_probabilities(batch, values)
            divergence += float((expected[number].exp() * (expected[number] - theirs)).sum(dtype=torch.float64))
            tokens += len(theirs)
        losses[layer] = Loss(energy, divergence / tokens / max(energy.at(start), 1e-30))
    return losses


def _sparse_outputs(
    weights: FFNWeights, energy: MissingEnergy, counts: Counts, sample: list[Batch], inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The sparse FFN's outputs with mean compensation and output bias: [B*T, H] for each batch."""
    neurons = energy.ranking[: counts.loaded]
    part = weights.of_neurons(neurons)
    selection = SimulatedSelection("up", counts, part.down, None, energy.mean_abs[neurons])
    dense, sparse = [], []
    for batch, x in zip(sample, inputs, strict=True):
        x = x.to(part.down.device)
        dense.append(weights.output(weights.activations(x)[0]))
        sparse.append(part.output(selection.apply(batch, *part.activations(x))))
    for kind in ("prompt", "decoded"):
        masks = [getattr(batch, kind).flatten().to(part.down.device) for batch in sample]
        missing = [(a - b)[mask].float() for a, b, mask in zip(dense, sparse, masks, strict=True)]
        mean = torch.cat(missing).sum(0) / max(sum(map(len, missing)), 1)
        for values, mask in zip(sparse, masks, strict=True):
            values[mask] += mean.to(values.dtype)
    if part.output_bias is not None:
        sparse = [values + part.output_bias for values in sparse]
    return sparse
