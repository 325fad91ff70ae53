"""Runs a model layer by layer over all texts, so that a change to one layer reaches the layers above it.

Memory holds the hidden states of every token between two layers, and the activations of one batch. The model is
traversed once, however many passes a single layer needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from profiler.collect import pad
from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of


@dataclass(frozen=True)
class Batch:
    """Token sequences, padded on the right, and which tokens are prefilled and which are decoded."""

    ids: torch.Tensor  # int64 [B, T]
    prompt: torch.Tensor  # bool [B, T]: tokens that are prefilled
    decoded: torch.Tensor  # bool [B, T]: tokens that come after them; padding is neither

    @property
    def real(self) -> torch.Tensor:
        """bool [B, T]: everything that is not padding."""
        return self.prompt | self.decoded


def make_batches(sequences: list[list[int]], prompts: list[int], batch_size: int) -> list[Batch]:
    """Batches of sequences of similar length. prompts: how many tokens of each sequence are its prompt."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    batches = []
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        ids, mask = pad([sequences[i] for i in chosen], torch.device("cpu"), left=False)
        place = torch.arange(ids.shape[1])
        prompt = place < torch.tensor([prompts[i] for i in chosen])[:, None]
        batches.append(Batch(ids, prompt, mask.bool() & ~prompt))
    return batches


class LayerwiseModel:
    """The decoder layers of a transformers model, one at a time.

    Each layer is called with the arguments that the model itself passes for texts of the same length. There is no
    padding mask: padding is on the right and attention is causal.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.family = model.eval(), family_of(model.config)
        self.layers = self.family.decoder_layers(model)
        self._arguments: dict[
            int, list
        ] = {}  # text length -> the further arguments of every layer, by place and by name

        if self.family.found is not None:
            self._check()

    def _check(self) -> None:
        """Raise PartInferError unless the layers, one by one, give what the model does: not all are alike."""
        ids = torch.arange(1, 5)[None] % self.model.config.vocab_size
        batch = Batch(ids, torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))
        try:
            hidden = self.inputs(batch)
            for layer in range(len(self.layers)):
                hidden = self.run(layer, hidden)
            ours = self.log_probabilities(batch, hidden)
            with torch.no_grad():
                logits = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits
            expected = torch.log_softmax(logits[0].float(), dim=-1)
            same = ours.shape == expected.shape and bool((ours - expected).abs().max() < 0.1)
        except (RuntimeError, LookupError, TypeError, ValueError):
            same = False
        if not same:
            raise PartInferError(
                f"the layers of {self.model.config.model_type} can't be run one by one, as fits and --budget per_layer "
                "need it: leave them out"
            )

    @torch.no_grad()
    def inputs(self, batch: Batch) -> torch.Tensor:
        """[B, T, H], on the CPU: the input of the first layer."""
        length = batch.ids.shape[1]
        if length not in self._arguments:
            self._arguments[length] = [given for _, *given in self._calls(batch.ids[:1])]
        return self._calls(batch.ids)[0][0].cpu()

    @torch.no_grad()
    def run(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one layer: [B, T, H] -> [B, T, H], both on the CPU."""
        module = self.layers[layer]
        device = next(module.parameters()).device
        places, names = self._arguments[hidden.shape[1]][layer]
        output = module(hidden.to(device), *places, **names)
        return (output[0] if isinstance(output, tuple) else output).cpu()

    def ffn_input(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[B*T, H], on the CPU: the input of the layer's FFN."""
        seen = []

        def look(x: torch.Tensor) -> torch.Tensor:
            seen.append(x.cpu())
            return torch.zeros_like(x)

        with self.ffn_replaced(layer, look):
            self.run(layer, hidden)
        return seen[0]

    @torch.no_grad()
    def log_probabilities(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [decoded tokens, V]: the predictions after each decoded token, from the last layer's output."""
        with _forward_is(self.layers, lambda *_, **__: hidden.to(self.model.device)):
            logits = self.model(input_ids=batch.ids.to(self.model.device), use_cache=False).logits
        return torch.log_softmax(logits[batch.decoded.to(logits.device)].float(), dim=-1)

    @contextmanager
    def ffn_replaced(self, layer: int, compute: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Within the block, `compute` replaces the layer's FFN: [B*T, H] -> [B*T, H], output bias included."""
        module = self.layers[layer]
        originals = self.family.swap_ffn(module, _Compute(compute))
        try:
            yield
        finally:
            for name, original in originals.items():
                module.set_submodule(name, original)

    def _calls(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, tuple, dict]]:
        """The hidden states and further arguments that the model passes to each layer; the layers do nothing."""
        calls = []

        def record(hidden: torch.Tensor, *places, **names) -> torch.Tensor:
            calls.append((hidden, places, names))
            return hidden

        with _forward_is(self.layers, record):
            self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False)
        return calls


class _Compute(nn.Module):
    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x.reshape(-1, x.shape[-1])).reshape(x.shape)


@contextmanager
def _forward_is(modules: nn.ModuleList, function: Callable) -> Iterator[None]:
    own = [
        module.__dict__.get("forward") for module in modules
    ]  # accelerate sets one where it moves inputs between devices
    try:
        for module in modules:
            module.forward = function
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@dataclass(frozen=True)
class FFNWeights:
    """The FFN of one layer, one row per neuron, on the layer's device. Biases are None where the model has none."""

    gate: torch.Tensor | None  # [N, H]; None if the FFN is plain
    up: torch.Tensor  # [N, H]
    down: torch.Tensor  # [N, H], transposed
    gate_bias: torch.Tensor | None  # [N]
    up_bias: torch.Tensor | None  # [N]
    output_bias: torch.Tensor | None  # [H]
    activation: Callable[[torch.Tensor], torch.Tensor]  # act, elementwise

    @classmethod
    def of(cls, model: PreTrainedModel, layer: int) -> FFNWeights:
        """The FFN of a model's layer."""
        family = family_of(model.config)
        module, size = family.ffn_module(model, layer), family.intermediate_size(model.config)
        down, activation = getattr(module, family.down), family.activation_of(module, model.config)
        rows = {}
        for name, (projection, first) in family.row_ranges(model.config).items():
            linear, part = getattr(module, projection), slice(first or 0, (first or 0) + size)
            rows[name] = linear.weight[part], None if linear.bias is None else linear.bias[part]
        gate, gate_bias = rows.get("gate", (None, None))
        return cls(
            gate,
            rows["up"][0],
            down.weight.t().contiguous(),
            gate_bias,
            rows["up"][1],
            down.bias,
            ACT2FN[activation] if isinstance(activation, str) else activation,
        )

    def of_neurons(self, neurons: torch.Tensor) -> FFNWeights:
        """The same FFN with some of its neurons only. neurons: int64 [L]."""

        def rows(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value.index_select(0, neurons.to(value.device))

        return FFNWeights(
            rows(self.gate),
            rows(self.up),
            rows(self.down),
            rows(self.gate_bias),
            rows(self.up_bias),
            self.output_bias,
            self.activation,
        )

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """h [.., N], the projection up·x, and act(gate·x), or None if the FFN is plain."""
        up = nn.functional.linear(x, self.up, self.up_bias)
        if self.gate is None:
            return self.activation(up), up, None
        gate = self.activation(nn.functional.linear(x, self.gate, self.gate_bias))
        return gate * up, up, gate

    def output(self, h: torch.Tensor) -> torch.Tensor:
        """[.., H], without the output bias: that is added whichever neurons are computed."""
        return h @ self.down
