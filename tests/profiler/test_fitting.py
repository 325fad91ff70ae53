"""The fit of a layer on tiny models of every family, against a regression on a plain transformers model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from profiler.fitting import FitSettings, Fitter
from profiler.layerwise import FFNWeights, LayerwiseModel, make_batches
from profiler.simulation import SimulatedSelection
from tests.conftest import INTERMEDIATE, VOCABULARY
from tests.transformers_patches.masked_reference import MaskedReference

RANKING = torch.randperm(INTERMEDIATE, generator=torch.Generator().manual_seed(5))


def sequences(count: int = 12, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


def make_fitter(checkpoint, settings: FitSettings, prompt: int = 25) -> Fitter:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return Fitter(LayerwiseModel(model), make_batches(sequences(), [prompt] * 12, 5), settings)


def test_fit_leaves_less_error_than_the_mean(checkpoint):
    fitter = make_fitter(checkpoint, FitSettings(0.7, 0.4))
    for layer in (0, 1):
        fitted = fitter.fit(layer, RANKING)
        assert fitted.after < 0.95 * fitted.before
        fit = fitted.fit
        assert fit.down is not None
        gated = FFNWeights.of(fitter.model.model, layer).gate is not None
        assert (fit.gate_size is not None) == gated
        assert len(fit.neurons) == round(0.7 * INTERMEDIATE)


def test_choosing_the_best_leaves_less_error_than_a_random_choice(checkpoint):
    settings = FitSettings(0.5, 0.5, token_selection=None)
    best = make_fitter(checkpoint, settings).fit(0, None)
    assert best.after < make_fitter(checkpoint, settings).fit(0, RANKING).after
    assert len(best.fit.neurons.unique()) == INTERMEDIATE // 2


def test_everything_loaded_and_computed_changes_nothing(checkpoint):
    fitter = make_fitter(checkpoint, FitSettings(1.0, 1.0, ridge=0.0))
    expected = [fitter.model.run(0, hidden) for hidden in fitter.hidden]
    fitted = fitter.fit(0, RANKING)
    down = FFNWeights.of(fitter.model.model, 0).down
    assert (fitted.fit.down - down[RANKING]).abs().max() < 1e-4
    assert fitted.fit.bias_prefill.abs().max() < 1e-4
    assert fitted.before < 1e-9
    for ours, dense in zip(fitter.hidden, expected, strict=True):
        assert (ours - dense).abs().max() < 1e-3


def test_refit_is_the_ridge_regression_of_what_is_missing(checkpoint):
    """Prompt and decoded tokens alike, no selection: one weighted regression with an intercept, written out."""
    ridge = 0.1
    fitted = make_fitter(checkpoint, FitSettings(0.6, 0.6, token_selection=None, ridge=ridge), prompt=40)
    entering = torch.cat([hidden.flatten(0, 1) for hidden in fitted.hidden]).double().square().mean(-1)
    fit = fitted.fit(0, RANKING).fit
    reference = MaskedReference(checkpoint)
    reference(torch.tensor(sequences()))
    h = reference.seen[0][0].reshape(-1, INTERMEDIATE).double()
    down = FFNWeights.of(fitted.model.model, 0).down.detach().double()
    loaded, rest = RANKING[:48], RANKING[48:]
    missing = h[:, rest] @ down[rest]
    weights = (entering.median() / (entering + (h @ down).square().mean(-1))).clamp(max=1.0)[:, None]
    assert 0 < float(weights.min()) < 0.9
    shares = weights / weights.sum()
    mean, mean_missing = (h[:, loaded] * shares).sum(0), (missing * shares).sum(0)
    centered = h[:, loaded] - mean
    covariance = centered.t() @ (shares * centered)
    damped = covariance + ridge * covariance.diagonal().mean() * torch.eye(48)
    added = torch.linalg.solve(damped, centered.t() @ (shares * (missing - mean_missing)))
    assert (fit.down.double() - down[loaded] - added).abs().max() < 1e-4
    bias = mean_missing - mean @ added
    assert (fit.bias_prefill.double() - bias).abs().max() < 1e-4
    assert torch.equal(fit.bias_prefill, fit.bias_decode)


def test_layers_above_get_what_the_fitted_layers_below_give(checkpoint):
    settings = FitSettings(0.6, 0.3)
    fitted, dense = make_fitter(checkpoint, settings), make_fitter(checkpoint, settings)
    fitted.fit(0, RANKING)
    dense.pass_through(0)
    assert not torch.equal(fitted.hidden[0], dense.hidden[0])
    assert not torch.equal(fitted.fit(1, RANKING).fit.down, dense.fit(1, RANKING).fit.down)


@pytest.mark.parametrize("selection", ["up", "gate", None])
def test_above_the_threshold_decoded_tokens_have_the_kept_neurons_on_average(tiny_checkpoints, selection):
    fitter = make_fitter(tiny_checkpoints["llama"], FitSettings(0.7, 0.4, token_selection=selection))
    inputs = [fitter.model.ffn_input(0, hidden) for hidden in fitter.hidden]
    fit = fitter.fit(0, RANKING).fit
    if selection is None:
        assert fit.threshold is None
        return
    weights = FFNWeights.of(fitter.model.model, 0).of_neurons(fit.neurons.long())
    counts = fitter.settings.counts(FFNWeights.of(fitter.model.model, 0), fitter.settings.share)
    mean_abs = torch.ones(counts.loaded)
    simulated = SimulatedSelection(selection, counts, fit.down, fit.gate_size, mean_abs)
    kept = tokens = 0
    for batch, x in zip(fitter.batches, inputs, strict=True):
        for _, scores in simulated.decoded_scores(batch, *weights.activations(x)):
            kept, tokens = kept + int((scores > fit.threshold).sum()), tokens + len(scores)
    assert tokens > 10
    assert kept == counts.kept * tokens


def test_decoded_tokens_compute_the_kept_neurons_and_prompts_all(tiny_checkpoints, monkeypatch):
    seen = []
    apply = SimulatedSelection.apply

    def spy(self, batch, h, up, gate):
        result = apply(self, batch, h, up, gate)
        seen.append((batch, h, result, self.counts.kept))
        return result

    monkeypatch.setattr(SimulatedSelection, "apply", spy)
    make_fitter(tiny_checkpoints["llama"], FitSettings(0.7, 0.4)).fit(0, RANKING)
    for batch, h, result, kept in seen:
        assert kept == 20  # (3 · 0.4 · 80 - 56) / 2
        prompt, decoded = batch.prompt.flatten(), batch.decoded.flatten()
        assert torch.equal(result[prompt], h[prompt])
        assert ((result[decoded] != 0).sum(1) == kept).all()
        same = result[decoded] != 0
        assert torch.equal(result[decoded][same], h[decoded][same])
