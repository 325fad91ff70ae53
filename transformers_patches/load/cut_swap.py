"""Modules that read less, in place of FFNs that themselves leave out most of their neurons, where native kernels compute.

CutFFNs where a bound over all neurons is the model's own, ZerosFFNs where the activation makes zeros.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.cut_ffn import CutFFN
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.sparse.zeros_ffn import MADE_BY, ZerosFFN
from transformers_patches.structure.empty_model import without_memory
from transformers_patches.structure.ffn_layout import FFNLayout
from transformers_patches.weights.source import Source


def swap_cut_ffns(model: PreTrainedModel, run: ResolvedRun) -> dict[str, Source]:
    """Put a CutFFN or ZerosFFN in place of each such FFN that is computed whole; where the new weights come from.

    Elsewhere transformers' module stays, except in packs, whose rows are the same for all kernels.
    """
    sources: dict[str, Source] = {}
    found = run.family.found
    if found is None or not (run.native or run.packed):
        return sources
    whole = [number for number in range(run.config.num_hidden_layers) if number not in run.plan.layers]
    own = {number: (found.ffn, found.layout) for number in whole if run.family.has_neurons(number)}
    for number, (place, layout) in (own | found.cuts).items():
        layer = run.family.decoder_layers(model)[number]
        module = layer.get_submodule(place)
        new = _cut_ffn(run, layout, module) if number in found.cuts else _zeros_ffn(run, layout, module)
        if new is None:
            continue
        layer.set_submodule(place, new.to(run.dtype))
        sources |= _sources(f"{run.family.layers}.{number}.{place}", layout, new)
    return sources


def _cut_ffn(run: ResolvedRun, layout: FFNLayout, module: nn.Module) -> CutFFN | None:
    """None if it has what a CutFFN lacks."""
    if layout.gate is None or layout.fused or layout.outside != 1 or layout.inside != 1:
        return None
    if any(getattr(module, name).bias is not None for name in (layout.gate, layout.up, layout.down)):
        return None
    with without_memory():
        return CutFFN(_rows(run, layout, module), layout.cut)


def _zeros_ffn(run: ResolvedRun, layout: FFNLayout, module: nn.Module) -> ZerosFFN | None:
    """None if its activation makes no zeros."""
    if layout.gate is not None or layout.activation_of(module) not in MADE_BY:
        return None
    with without_memory():
        return ZerosFFN(_rows(run, layout, module), output_bias=getattr(module, layout.down).bias is not None)


def _rows(run: ResolvedRun, layout: FFNLayout, module: nn.Module) -> NeuronRows:
    return NeuronRows(
        layout.size,
        run.config.hidden_size,
        layout.activation_of(module),
        gated=layout.gate is not None,
        input_bias=getattr(module, layout.up).bias is not None,
        weight_format=run.weight_format,
        native=run.native,
    )


def _sources(prefix: str, layout: FFNLayout, ffn: CutFFN | ZerosFFN) -> dict[str, Source]:
    """Where the weights of a module at this place come from."""
    every, sources = torch.arange(layout.size), {}
    for row in ffn.rows.row_names:
        name, _, bias = row.partition("_")
        stored = f"{prefix}.{getattr(layout, name)}.{'bias' if bias else 'weight'}"
        how = "columns" if name == "down" else "rows"
        sources[f"{prefix}.rows.{row}"] = Source(stored, how, every, size=layout.size)
    if getattr(ffn, "output_bias", None) is not None:
        sources[f"{prefix}.output_bias"] = Source(f"{prefix}.{layout.down}.bias")
    return sources
