"""SparseFFNs in place of a model's FFNs: where their weights come from, and what compensates for those left out."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from transformers_patches.config import TOKEN_SELECTIONS
from transformers_patches.neurons.fit_file import LayerFit
from transformers_patches.plan.load_plan import LayerPlan
from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.compensation import Compensation
from transformers_patches.sparse.layer_selection import LayerSelection
from transformers_patches.sparse.moved_rows import CudaCopies, MovedRows, Transfers
from transformers_patches.sparse.neuron_rows import BY_INPUT, PAIRED, PLAIN, NeuronRows
from transformers_patches.sparse.prior import Prior
from transformers_patches.sparse.prompt_selection import PromptSelection
from transformers_patches.sparse.request import RequestLayer, RequestState
from transformers_patches.sparse.rows_on_demand import OnDemandRows
from transformers_patches.sparse.selection import Selection
from transformers_patches.sparse.sparse_ffn import SparseFFN
from transformers_patches.sparse.token_selection import TokenSelection
from transformers_patches.structure.empty_model import without_memory
from transformers_patches.weights.parts import part_name
from transformers_patches.weights.source import Source, WeightedSum


def swap_ffns(model: PreTrainedModel, run: ResolvedRun, state: RequestState) -> dict[str, Source]:
    """Put a SparseFFN in place of each planned FFN; where the new parameters come from."""
    family, sources = run.family, {}
    transfers = Transfers(CudaCopies(run.device))
    for layer in run.plan.layers:
        dense = family.ffn_module(model, layer)
        place = f"{family.layers}.{layer}.{family.ffn_children[0]}"
        sources |= {f"{place}.{name}": source for name, source in _sources(run, layer, dense).items()}
        ffn = _sparse_ffn(run, layer, dense, state)
        if isinstance(ffn.rows, MovedRows):
            ffn.rows.join(transfers)
        family.swap_ffn(family.decoder_layers(model)[layer], ffn)
    return sources


def _sparse_ffn(run: ResolvedRun, layer: int, dense: nn.Module, state: RequestState) -> SparseFFN:
    """What replaces a layer's FFN, still without memory. dense: the module with the layer's projections."""
    family, plan = run.family, run.plan.layers[layer]
    up, down = getattr(dense, family.up), getattr(dense, family.down)
    prior, activation = _prior(run, layer, plan), family.activation_of(dense, run.config)
    with without_memory():
        rows = _kind_of_rows(run)(
            plan.loaded_count,
            up.in_features,
            activation,
            gated=family.gated,
            input_bias=up.bias is not None,
            weight_format=run.weight_format,
            native=run.by_kernels and not run.settings.memory_limit,  # rows that move are gathered first
            layout=_layout(run),
        )
        selection = _selection(run, rows, layer, prior)
        return SparseFFN(rows, selection, state, output_bias=down.bias is not None).to(run.dtype)


def _kind_of_rows(run: ResolvedRun) -> type[NeuronRows]:
    if run.settings.memory_limit:
        return MovedRows
    return NeuronRows if run.resident is None else OnDemandRows


def _layout(run: ResolvedRun) -> str:
    if run.layer_choices is not None:
        return BY_INPUT
    return PAIRED if run.settings.selection == "up" else PLAIN


def _prior(run: ResolvedRun, layer: int, plan: LayerPlan) -> Prior:
    settings = run.settings
    by_curve = settings.max_loss is not None or run.layer_choices is not None
    if by_curve and run.base is not None and run.base.loss is not None:
        return Prior.of_curve(plan, layer, run.base, settings.sparsity)
    with_threshold = run.fit is not None and run.fit.has_thresholds(settings.selection, settings.sparsity)
    prior = Prior.of(plan, layer, run.base, _fit_of(run, layer), with_threshold=with_threshold)
    return prior.with_clusters(plan, layer, run.base.clusters) if settings.selection == "similarity" else prior


def _selection(run: ResolvedRun, rows: NeuronRows, layer: int, prior: Prior) -> Selection:
    """What chooses the neurons of a layer."""
    settings, plan = run.settings, run.plan.layers[layer]
    if run.layer_choices is not None:
        return LayerSelection(rows, plan, prior, run.layer_choices[layer])
    if settings.selection in TOKEN_SELECTIONS:
        return TokenSelection(rows, plan, prior, settings.selection, average=settings.token_count == "average")
    return PromptSelection(
        rows,
        plan,
        prior,
        settings.selection,
        token_sparsity=settings.token_sparsity,
        compensate=settings.compensation != "none",
    )


def selection_for(run: ResolvedRun, layer: int, rows: NeuronRows, known: Prior) -> Selection:
    """What another run chooses a layer's neurons by, over rows that are loaded already. known: the rows' prior."""
    plan = run.plan.layers[layer]
    return _selection(run, rows, layer, _prior(run, layer, plan).with_norms_of(known))


def _sources(run: ResolvedRun, layer: int, dense: nn.Module) -> dict[str, Source]:
    """Where the parameters of a layer's SparseFFN come from, by their names in it."""
    family, neurons = run.family, run.plan.layers[layer].neurons
    up, down, size = getattr(dense, family.up), getattr(dense, family.down), run.plan.intermediate_size
    sources = {}
    for row, (projection, first) in family.row_ranges(run.config).items():
        for kind in ("weight",) if up.bias is None else ("weight", "bias"):
            name = f"{family.projection(layer, projection)}.{kind}"
            own = row if kind == "weight" else f"{row}_bias"
            part = name if first is None else part_name(name, first, first + size)
            by_input = own == "up" and run.layer_choices is not None
            sources[f"rows.{own}"] = (
                Source.by_input(part, up.in_features) if by_input else Source(part, "rows", neurons)
            )
    sources |= _activation_sources(run, layer, dense)
    prefix = family.projection(layer, family.down)
    fitted = run.settings.compensation == "refit"
    sources["rows.down"] = Source(
        f"{prefix}.weight",
        "columns",
        neurons,
        None if fitted else _left_out(run, layer, up.in_features),
        _fit_of(run, layer) if fitted else None,
    )
    if down.bias is not None:
        sources["output_bias"] = Source(f"{prefix}.bias")
    return sources


def _activation_sources(run: ResolvedRun, layer: int, dense: nn.Module) -> dict[str, Source]:
    """Where the numbers of an activation come from that has some, as xIELU."""
    activation = run.family.activation_of(dense, run.config)
    if isinstance(activation, str):
        return {}
    child = run.family.found.layout.activation[1:]
    prefix = run.family.projection(layer, child)
    names = [name for name, _ in (*activation.named_parameters(), *activation.named_buffers())]
    return {f"rows.act_fn.{name}": Source(f"{prefix}.{name.removeprefix('activation.')}") for name in names}


def _fit_of(run: ResolvedRun, layer: int) -> LayerFit | None:
    return None if run.fit is None else run.fit.layers[layer]


def _left_out(run: ResolvedRun, layer: int, hidden_size: int) -> WeightedSum | None:
    """The sum that becomes the mean compensation of the neurons that are not loaded."""
    if run.settings.compensation != "mean" or run.base is None:
        return None
    loaded = torch.zeros(run.plan.intermediate_size, dtype=torch.bool)
    loaded[run.plan.layers[layer].neurons] = True
    others = (~loaded).nonzero().squeeze(1)
    return WeightedSum(others, run.base.statistics["mean"][layer][others].float(), torch.zeros(hidden_size))


def attach_compensation(layers: list[RequestLayer], sources: dict[str, Source], run: ResolvedRun) -> None:
    """Give the SparseFFNs, in the plan's order, what stands in for left-out neurons, once all weights are read."""
    sums = [source.left_out for source in sources.values() if source.how == "columns" and source.size is None]
    for layer, ffn, left_out in zip(run.plan.layers, layers, sums, strict=True):
        if run.settings.compensation == "refit":
            fitted = run.fit.layers[layer]
            # what decoding leaves out of a prompt's choice has its own means; a token's choice has the fitted bias
            decode = fitted.bias_decode if run.settings.selects_per_token else fitted.bias_prefill
            ffn.compensation = Compensation(*(bias.to(run.device, run.dtype) for bias in (fitted.bias_prefill, decode)))
        elif left_out is not None:
            bias = left_out.out.to(run.device, run.dtype)
            ffn.compensation = Compensation(bias, bias)
