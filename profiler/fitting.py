"""Fits the loaded neurons of each layer so that they make up for those that are not loaded or not computed.

For one layer, let x be its FFN's input, h~ [L] the activations of the loaded neurons (for decoded tokens 0 where the
selection per token skips a neuron), D [L, H] their down rows, and e = FFN(x) - D^T h~. Least squares finds M and b that
minimise

    E |e - M^T h~ - b|^2 + ridge |M|^2

D + M are the refitted rows; b is one bias for prefilled and one for decoded tokens. The inputs x come from the fitted
layers below, so each layer also learns to correct their errors.

A token's weight depends on the size of its hidden state. Otherwise some layers would be fitted to nothing but the few
tokens with massive activations, often the first of a text (Sun et al. 2024, arXiv 2402.17762).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from profiler.budget import Share
from profiler.layerwise import Batch, FFNWeights, LayerwiseModel
from profiler.least_squares import NormalEquations, best_to_keep, product_of, refit
from profiler.simulation import Counts, SimulatedSelection
from transformers_patches.config import DEFAULT_BASE, neuron_count
from transformers_patches.neurons.fit_file import LayerFit
from transformers_patches.plan.load_plan import candidate_count, kept_count
from transformers_patches.sparse.token_selection import score_threshold

THRESHOLD_TOKENS = 2048  # about how many decoded tokens determine a layer's threshold
PREFILL, DECODE = 0, 1  # groups of tokens, each with its own bias
SURVEY_TOKENS, SURVEY_TOKENS_PER_NEURON = 8192, 1.5  # enough to choose neurons; the fit itself uses all tokens


@dataclass(frozen=True)
class FitSettings:
    """What is fitted, and for which use."""

    loaded: float  # gamma: fraction of a layer's bytes that is loaded
    sparsity: float  # phi: fraction of a layer's bytes that a decoded token reads
    down_rank: int = 0  # store the change of the rows as a product of this rank, for a smaller file; 0: whole rows
    token_selection: str | None = "up"  # "up", "gate", or None if decoding computes every loaded neuron
    ridge: float = 0.03  # pull towards the original rows, as a share of the mean E[h_i^2]

    @property
    def share(self) -> Share:
        """The share of every layer, unless each has its own."""
        return Share(self.loaded, self.sparsity)

    def counts(self, weights: FFNWeights, share: Share) -> Counts:
        """How many neurons of a layer are loaded and computed, as build_load_plan counts them."""
        size, matrices = len(weights.down), 2 if weights.gate is None else 3
        loaded = min(neuron_count(share.loaded, size), size)
        if self.token_selection is None:
            return Counts(loaded, loaded, loaded, loaded)
        candidates = candidate_count(share.sparsity, loaded, size)
        kept = kept_count(share.sparsity, candidates, size, matrices)
        base = min(neuron_count(DEFAULT_BASE, size), neuron_count(share.sparsity, size), candidates)
        return Counts(loaded, candidates, kept, base)


@dataclass(frozen=True)
class FittedLayer:
    """A layer's fit, and its mean squared output errors relative to the mean squared output."""

    fit: LayerFit  # neurons, biases and refitted rows
    before: float  # error with the original rows and the best biases
    after: float  # error with the fit


@dataclass(frozen=True)
class _Survey:
    """What the choice of neurons needs to know about all neurons of a layer, from a sample of the batches."""

    mean_abs: torch.Tensor  # float32 [N]: mean |h|
    gate_size: torch.Tensor | None  # float32 [N]: root of the mean act(gate)^2; None if the FFN is plain
    covariance: torch.Tensor | None  # float64 [N, N]: of h; None if not asked for

    @classmethod
    def of(
        cls,
        weights: FFNWeights,
        batches: list[Batch],
        inputs: list[torch.Tensor],
        sizes: _Sizes,
        *,
        with_covariance: bool,
    ) -> _Survey:
        size, device = len(weights.down), weights.down.device
        absolute, squares, tokens = torch.zeros(size, device=device), torch.zeros(size, device=device), 0
        equations = NormalEquations(size, 0, 1, device) if with_covariance else None
        every = sum(int(batch.real.sum()) for batch in batches)
        step = max(1, int(every / max(SURVEY_TOKENS, SURVEY_TOKENS_PER_NEURON * size)))
        for batch, x, entering in list(zip(batches, inputs, sizes.entering, strict=True))[::step]:
            real = batch.real.flatten()
            h, _, gate = weights.activations(x[real].to(device))
            tokens += len(h)
            absolute += h.float().abs().sum(0)
            if gate is not None:
                squares += gate.float().square().sum(0)
            if equations is not None:
                counted = sizes.weights(entering[real], weights.output(h))
                equations.add(h, h.new_zeros(len(h), 0), counted, 0)
        return cls(
            absolute / tokens,
            None if weights.gate is None else (squares / tokens).sqrt(),
            None if equations is None else equations.centered()[0],
        )


@dataclass(frozen=True)
class _Sizes:
    """Mean squares of the hidden states that enter a layer."""

    entering: list[torch.Tensor]  # float32 [B*T] for each batch
    usual: float  # the median of all real tokens

    @classmethod
    def of(cls, batches: list[Batch], hidden: list[torch.Tensor]) -> _Sizes:
        """hidden: [B, T, H] for each batch."""
        entering = [values.float().square().mean(-1).flatten() for values in hidden]
        real = [size[batch.real.flatten()] for batch, size in zip(batches, entering, strict=True)]
        return cls(entering, float(torch.cat(real).median()))

    def weights(self, entering: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """float32 [T]: the tokens' weights, 1, or less if the hidden state is larger than usual.

        The layers above normalise the sum of hidden state and output, so an error matters relative to its size:
        min(1, median |hidden|^2 / (|hidden|^2 + |output|^2)).

        entering: [T], mean squares of the tokens' hidden states, taken from the field of that name
        output: [T, H], the FFN's output
        """
        size = entering.to(output.device) + output.float().square().mean(-1)
        return (self.usual / size.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1.0)


class Fitter:
    """Fits layers from the first to the last. `hidden` holds the next layer's input, [B, T, H] for each batch."""

    def __init__(self, model: LayerwiseModel, batches: list[Batch], settings: FitSettings) -> None:
        self.model, self.batches, self.settings = model, batches, settings
        self.hidden = [model.inputs(batch) for batch in batches]

    @torch.no_grad()
    def pass_through(self, layer: int) -> None:
        """Run a layer that is not sparse."""
        self.hidden = [self.model.run(layer, hidden) for hidden in self.hidden]

    @torch.no_grad()
    def fit(self, layer: int, ranking: torch.Tensor | None, share: Share | None = None) -> FittedLayer:
        """Fit a layer and run it.

        ranking: int64 [N], neurons best first; None: choose those whose refit leaves the smallest error
        share: the layer's own share of the budget; None: that of the settings
        """
        weights = FFNWeights.of(self.model.model, layer)
        counts = self.settings.counts(weights, share or self.settings.share)
        inputs = [self.model.ffn_input(layer, hidden) for hidden in self.hidden]
        sizes = _Sizes.of(self.batches, self.hidden)
        survey = _Survey.of(weights, self.batches, inputs, sizes, with_covariance=ranking is None)
        if ranking is None:
            neurons = best_to_keep(survey.covariance, weights.down, counts.loaded, self.settings.ridge)
        else:
            neurons = ranking[: counts.loaded].to(weights.down.device)
        part = weights.of_neurons(neurons)
        gate_size = None if survey.gate_size is None else survey.gate_size[neurons]
        selection = SimulatedSelection(
            self.settings.token_selection, counts, part.down, gate_size, survey.mean_abs[neurons]
        )
        del survey
        fitted = self._solve(weights, part, neurons, selection, inputs, sizes)
        down = fitted.fit.refitted(part.down).to(part.down.device)
        selection = selection.with_rows(down)  # decoding scores neurons by the refitted rows, too
        fitted.fit.threshold = self._threshold(part, selection, inputs)
        self._run_fitted(layer, part, down, selection, fitted.fit)
        return fitted

    def _solve(
        self,
        weights: FFNWeights,
        part: FFNWeights,
        neurons: torch.Tensor,
        selection: SimulatedSelection,
        inputs: list[torch.Tensor],
        sizes: _Sizes,
    ) -> FittedLayer:
        loaded, hidden = part.down.shape
        device = part.down.device
        equations = NormalEquations(loaded, hidden, 2, device)
        output = 0.0
        for batch, x, entering in zip(self.batches, inputs, sizes.entering, strict=True):
            x = x.to(device)
            every = weights.activations(x)
            y = weights.output(every[0]).float()
            counted = sizes.weights(entering, y)
            loaded_ones = [None if values is None else values.index_select(-1, neurons) for values in every]
            h = selection.apply(batch, *loaded_ones)
            error = y - part.output(h).float()
            for group, mask in ((PREFILL, batch.prompt), (DECODE, batch.decoded)):
                mask = mask.flatten().to(device)
                equations.add(h[mask], error[mask], counted[mask], group)
                output += float(y[mask].square().sum(1) @ counted[mask])
        solution = refit(equations, self.settings.ridge)
        left = right = None
        if 0 < self.settings.down_rank < min(loaded, hidden):
            left, right = product_of(solution, equations.centered()[0], self.settings.down_rank)
            solution = left @ right
        biases = equations.biases(solution)

        def stored(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.to(part.down.dtype).cpu()

        fit = LayerFit(
            neurons=neurons.to("cpu", torch.int32),
            bias_prefill=biases[PREFILL].cpu(),
            bias_decode=biases[DECODE if equations.tokens[DECODE] else PREFILL].cpu(),
            gate_size=None if selection.gate_size is None else selection.gate_size.cpu(),
            down=stored(part.down.float() + solution) if left is None else None,
            down_left=stored(left),
            down_right=stored(right),
        )
        mean_output = max(output / sum(equations.tokens), 1e-30)
        before = equations.error(None) / mean_output
        return FittedLayer(fit, before, equations.error(solution) / mean_output)

    def _threshold(
        self, part: FFNWeights, selection: SimulatedSelection, inputs: list[torch.Tensor]
    ) -> torch.Tensor | None:
        """float32 [1]: the score that as many neurons exceed, on average over decoded tokens, as a token computes."""
        if selection.kind is None or selection.counts.everything:
            return None
        decoded = sum(int(batch.decoded.sum()) for batch in self.batches)
        step = max(1, decoded // THRESHOLD_TOKENS)
        parts = [
            scores
            for batch, x in list(zip(self.batches, inputs, strict=True))[::step]
            for _, scores in selection.decoded_scores(batch, *part.activations(x.to(part.down.device)))
        ]
        if not parts:
            return None
        return torch.tensor([score_threshold(torch.cat(parts), selection.counts.kept)])

    def _run_fitted(
        self, layer: int, part: FFNWeights, down: torch.Tensor, selection: SimulatedSelection, fit: LayerFit
    ) -> None:
        """Run the layer over the hidden states as prefill and decoding will compute it. down: [L, H], refitted."""
        device, dtype = part.down.device, part.down.dtype
        bias = torch.stack([fit.bias_prefill, fit.bias_decode]).to(device, dtype)
        for place, (batch, hidden) in enumerate(zip(self.batches, self.hidden, strict=True)):
            decoded = batch.decoded.flatten().to(device).long()

            def compute(x: torch.Tensor, batch=batch, decoded=decoded) -> torch.Tensor:
                h = selection.apply(batch, *part.activations(x))
                y = h @ down + bias[decoded]
                return y if part.output_bias is None else y + part.output_bias

            with self.model.ffn_replaced(layer, compute):
                self.hidden[place] = self.model.run(layer, hidden)
