"""CutFFNs in place of FFNs that themselves leave out most of their neurons, where the native kernels compute."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.cut_ffn import CutFFN
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.structure.ffn_layout import FFNLayout
from transformers_patches.weights.source import Source


def swap_cut_ffns(model: PreTrainedModel, run: ResolvedRun) -> dict[str, Source]:
    """Put a CutFFN in place of each such FFN; where the new weights come from. Elsewhere transformers' module stays."""
    sources: dict[str, Source] = {}
    if not run.native or run.family.found is None:
        return sources
    for number, (place, layout) in run.family.found.cuts.items():
        if layout.gate is None or layout.fused or layout.outside != 1 or layout.inside != 1:
            continue
        layer = run.family.decoder_layers(model)[number]
        module = layer.get_submodule(place)
        linears = {name: getattr(module, getattr(layout, name)) for name in ("gate", "up", "down")}
        if any(linear.bias is not None for linear in linears.values()):
            continue
        layer.set_submodule(place, _cut_ffn(run, layout, layout.activation_of(module)))
        prefix, every = f"{run.family.layers}.{number}.{place}", torch.arange(layout.size)
        for name in linears:
            how = "columns" if name == "down" else "rows"
            stored = f"{prefix}.{getattr(layout, name)}.weight"
            sources[f"{prefix}.rows.{name}"] = Source(stored, how, every, size=layout.size)
    return sources


def _cut_ffn(run: ResolvedRun, layout: FFNLayout, activation) -> CutFFN:
    with init_empty_weights():
        rows = NeuronRows(
            layout.size,
            run.config.hidden_size,
            activation,
            gated=True,
            input_bias=False,
            weight_format=run.weight_format,
            native=True,
        )
        return CutFFN(rows, layout.cut).to(run.dtype)
