"""Experts stored by neuron in place of transformers' modules, where they are faster or hold fewer bits."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.experts import Experts
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.sparse.request import RequestState
from transformers_patches.structure.experts_layout import ExpertsLayout
from transformers_patches.weights.parts import part_name
from transformers_patches.weights.source import Source


def swap_experts(model: PreTrainedModel, run: ResolvedRun, state: RequestState) -> dict[str, Source]:
    """Put Experts in place of every mixture's module that has a known layout; where the new weights come from.

    Whole ones in floats without the native kernels stay in transformers' module: that is the same to the last bit.
    """
    family, layout = run.family, run.family.experts
    if layout is None or not (run.native or run.weight_format is not None or run.plan.experts):
        return {}
    sources, every = {}, torch.arange(layout.size)
    for number, layer in enumerate(family.decoder_layers(model)):
        if family.found.experts not in dict(layer.named_modules()):
            continue
        layer.set_submodule(family.found.experts, _experts(run, layout, number, state))
        place = f"{family.layers}.{number}.{family.found.experts}"
        for expert in range(layout.count):
            own = _sources(layout, place, expert, every)
            sources |= {f"{place}.rows.{expert}.{name}": source for name, source in own.items()}
    return sources


def _experts(run: ResolvedRun, layout: ExpertsLayout, layer: int, state: RequestState) -> nn.Module:
    kept = run.plan.experts.get(layer)
    with init_empty_weights():
        rows = [
            NeuronRows(
                layout.size,
                layout.hidden,
                layout.activation,
                gated=True,
                input_bias=False,
                weight_format=_format_of(run, layout),
                native=run.native,
            )
            for _ in range(layout.count)
        ]
        used = run.config.num_experts_per_tok
        return Experts(rows, used, None if kept is None else state, kept).to(run.dtype)


def _format_of(run: ResolvedRun, layout: ExpertsLayout):
    fits = run.weight_format is not None and layout.hidden % run.weight_format.group == 0
    return run.weight_format if fits else None


def _sources(layout: ExpertsLayout, place: str, expert: int, every: torch.Tensor) -> dict[str, Source]:
    """The rows of gate and of up follow each other in one tensor, expert after expert; down is one [H, N] after another."""
    first, size = 2 * layout.size * expert, layout.size
    gate_up, down = f"{place}.{layout.gate_up}", f"{place}.{layout.down}"
    return {
        "gate": Source(part_name(gate_up, first, first + size), "rows", every, size=size),
        "up": Source(part_name(gate_up, first + size, first + 2 * size), "rows", every, size=size),
        "down": Source(
            part_name(down, layout.hidden * expert, layout.hidden * (expert + 1)), "columns", every, size=size
        ),
    }
