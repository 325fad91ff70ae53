"""Experts stored by neuron in place of transformers' modules, where they are faster or hold fewer bits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from transformers_patches.errors import PartInferError
from transformers_patches.kernels import WeightFormat
from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.experts import Experts
from transformers_patches.sparse.neuron_rows import BY_ROW, PLAIN, NeuronRows
from transformers_patches.sparse.request import RequestState
from transformers_patches.structure.empty_model import without_memory
from transformers_patches.structure.experts_layout import ExpertsLayout
from transformers_patches.weights.parts import part_name
from transformers_patches.weights.source import Source


def swap_experts(model: PreTrainedModel, run: ResolvedRun, state: RequestState) -> dict[str, Source]:
    """Put Experts in place of every mixture's module that has a known layout; where the new weights come from.

    Whole ones in floats without the native kernels stay in transformers' module: that is the same to the last bit.
    """
    family, layout = run.family, run.family.experts
    changed = run.plan.experts or run.plan.expert_neurons
    if layout is None or not (run.native or run.weight_format is not None or changed):
        return {}
    sources: dict[str, Source] = {}
    for number, layer in enumerate(family.decoder_layers(model)):
        if family.found.experts not in dict(layer.named_modules()):
            continue
        layer.set_submodule(family.found.experts, _experts(run, layout, number, state))
        place = f"{family.layers}.{number}.{family.found.experts}"
        for expert in range(layout.count):
            own = _sources(layout, place, expert, _neurons(run, layout, number, expert))
            sources |= {f"{place}.rows.{expert}.{name}": source for name, source in own.items()}
        if layout.interleaved:
            sources[f"{place}.gate_up_bias"] = Source(f"{place}.{layout.gate_up_bias}")
            sources[f"{place}.down_bias"] = Source(f"{place}.{layout.down_bias}")
    return sources


def _neurons(run: ResolvedRun, layout: ExpertsLayout, layer: int, expert: int) -> torch.Tensor:
    """Which neurons of an expert are loaded."""
    planned = run.plan.expert_neurons.get(layer)
    return torch.arange(layout.size) if planned is None else planned[expert]


def _experts(run: ResolvedRun, layout: ExpertsLayout, layer: int, state: RequestState) -> nn.Module:
    kept = run.plan.experts.get(layer)
    named = "silu" if layout.interleaved else layout.activation  # of interleaved ones, rows don't compute activations
    with without_memory():
        rows = [
            NeuronRows(
                len(_neurons(run, layout, layer, expert)),
                layout.hidden,
                named,
                gated=True,
                input_bias=False,
                weight_format=_format_of(run, layout),
                native=run.native,
                layout=BY_ROW if layout.interleaved else PLAIN,
            )
            for expert in range(layout.count)
        ]
        experts = Experts(
            rows,
            experts_per_token(run.config),
            None if kept is None else state,
            kept,
            native_activation=_native_activation(run, layout, rows[0]),
            interleaved=layout.interleaved,
            size=layout.size,
        )
        return experts.to(run.dtype)


def experts_per_token(config: PretrainedConfig) -> int:
    """How many experts a router chooses for a token, whatever the config calls it."""
    counts = [getattr(config, name, None) for name in ("num_experts_per_tok", "top_k_experts", "moe_topk")]
    if not any(counts):
        raise PartInferError(
            f"{config.model_type}'s config doesn't say how many experts a token uses (num_experts_per_tok): "
            "use --method dense --kernels torch --dtype bfloat16"
        )
    return next(filter(None, counts))


def _native_activation(run: ResolvedRun, layout: ExpertsLayout, rows: NeuronRows) -> str | None:
    """What the native kernels call the activation; None where PyTorch computes."""
    weight_format = _format_of(run, layout)
    known = run.native and (weight_format is None or weight_format.native is not None)
    if not known:
        return None
    return layout.activation if layout.interleaved else rows.kernel_activation


def _format_of(run: ResolvedRun, layout: ExpertsLayout) -> WeightFormat | None:
    fits = run.weight_format is not None and layout.hidden % run.weight_format.group == 0
    return run.weight_format if fits else None


def _sources(layout: ExpertsLayout, place: str, expert: int, neurons: torch.Tensor) -> dict[str, Source]:
    """Where an expert's rows are in the tensors of all of them. neurons: int64, those that are loaded."""
    size, hidden = layout.size, layout.hidden
    gate_up, down = f"{place}.{layout.gate_up}", f"{place}.{layout.down}"
    if layout.interleaved:  # [E, H, 2 N] and [E, N, H]: columns of gate and up take turns, down has rows
        own = part_name(gate_up, hidden * expert, hidden * (expert + 1))
        return {
            "gate": Source(own, "columns", 2 * neurons, size=2 * size),
            "up": Source(own, "columns", 2 * neurons + 1, size=2 * size),
            "down": Source(part_name(down, size * expert, size * (expert + 1)), "rows", neurons, size=size),
        }
    first = (
        2 * size * expert
    )  # the rows of gate and of up follow each other in one tensor; down is one [H, N] after another
    return {
        "gate": Source(part_name(gate_up, first, first + size), "rows", neurons, size=size),
        "up": Source(part_name(gate_up, first + size, first + 2 * size), "rows", neurons, size=size),
        "down": Source(part_name(down, hidden * expert, hidden * (expert + 1)), "columns", neurons, size=size),
    }
