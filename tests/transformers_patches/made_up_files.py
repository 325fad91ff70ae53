"""Made-up statistics for neuron files, byte ladders, and a fit file, for the tiny models."""

import torch

from tests.conftest import HIDDEN, INTERMEDIATE, LAYERS, random_neuron_file
from transformers_patches.neurons.byte_ladder import INPUTS, THRESHOLDS, ByteLadder, Rung
from transformers_patches.neurons.clusters import Clusters
from transformers_patches.neurons.fit_file import FitFile, LayerFit
from transformers_patches.neurons.loss_curve import ALL, DEFAULT, LossCurve, LossPoint
from transformers_patches.neurons.neuron_file import NeuronFile


def with_statistics(seed: int, layers: int = LAYERS, size: int = INTERMEDIATE) -> NeuronFile:
    """A random ranking with random statistics that could be those of activations."""
    neurons = random_neuron_file(seed, layers, size)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.rand(layers, size, generator=generator)

    mean = (draw() - 0.5) * 0.2
    neurons.statistics = {
        "mean": mean,
        "mean_abs": mean.abs() + draw() * 0.1,
        "mean_sq": mean.square() + draw() * 0.1,
        "down_norm": draw() + 0.5,
    }
    return neurons


def made_up_clusters(count: int = 3, layers: int = LAYERS, size: int = INTERMEDIATE) -> Clusters:
    """Random clusters of texts."""
    generator = torch.Generator().manual_seed(9)
    centers = torch.nn.functional.normalize(torch.randn(count, layers, size, generator=generator), dim=2)
    return Clusters(centers.half(), torch.randint(0, 20, centers.shape, generator=generator).int())


def with_input_squares(seed: int, layers: int = LAYERS, hidden: int = HIDDEN, size: int = INTERMEDIATE) -> NeuronFile:
    """A random ranking with mean squares of the inputs of all linear layers, a few columns far above the others."""
    neurons = random_neuron_file(seed, layers, size)
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(2).exp_()

    neurons.statistics["mean_sq"] = draw(layers, size)
    neurons.input_squares = {name: draw(layers, hidden) for name in ("attention", "attention_output", "ffn")}
    neurons.input_squares["head"] = draw(1, hidden)
    return neurons


def made_up_ladder(losses: dict[float, float] | None = None, layers: int = LAYERS, hidden: int = HIDDEN) -> ByteLadder:
    """Rungs by default at 0.8, 0.6 and 0.4. Thresholds double; the first rung reads everything but rows of down."""
    losses = losses or {0.8: 0.02, 0.6: 0.06, 0.4: 0.3}
    generator = torch.Generator().manual_seed(5)

    def draw() -> torch.Tensor:
        return torch.rand(layers, hidden, generator=generator).half()

    doubled = torch.tensor([[0.5 * 2**i] * layers for i in range(len(losses))])
    thresholds = {name: doubled.clone() for name in THRESHOLDS}
    for name in THRESHOLDS[:-1]:
        thresholds[name][0] = -1
    neurons = torch.tensor([[1 - 0.2 * i] * layers for i in range(len(losses))])
    rungs = [Rung(share, loss, loss / 2) for share, loss in losses.items()]
    return ByteLadder(rungs, {n: draw() - 0.5 for n in INPUTS}, {n: draw() for n in INPUTS}, thresholds, neurons)


def made_up_fit(layers=range(1, 5), loaded: int = 56, **metadata: str) -> FitFile:
    """Random fits: whole rows, and a typical size of the gate."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    fits = {}
    for layer in layers:
        fits[layer] = LayerFit(
            torch.randperm(INTERMEDIATE, generator=generator)[:loaded].to(torch.int32),
            draw(HIDDEN),
            draw(HIDDEN),
            draw(loaded).abs() + 0.1,
            down=draw(loaded, HIDDEN),
        )
    made_for = {"compensation": "refit", "loaded_neurons_percent": "0.7", "sparsity": "0.4"}
    return FitFile(fits, INTERMEDIATE, made_for | metadata)


def made_up_curve(losses: dict[float, float] | None = None) -> LossCurve:
    """Points of all layers loaded whole, by default at 0.8, 0.6 and 0.4, with thresholds that double."""
    losses = losses or {0.8: 0.02, 0.6: 0.1, 0.4: 0.5}
    points = [LossPoint("up", ALL, 1.0, share, loss, loss / 2) for share, loss in losses.items()]
    points += [LossPoint("up", DEFAULT, 1.0, 0.5, 0.2, 0.1), LossPoint("up", DEFAULT, 0.7, 0.7, 0.3, 0.3)]
    points += [LossPoint("up", DEFAULT, 0.7, 0.35, 0.7, 0.6), LossPoint("core", DEFAULT, 0.7, 0.4, 0.9, 1.0)]
    thresholds = torch.tensor([[1.0 * 2**i] * LAYERS for i in range(len(losses))])
    return LossCurve(points, thresholds, torch.rand(LAYERS, INTERMEDIATE))
