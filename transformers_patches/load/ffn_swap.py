"""SparseFFNs in place of a model's FFNs: where their weights come from, and what compensates for those left out."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from transformers_patches.config import TOKEN_SELECTIONS, PartInferConfig
from transformers_patches.families import Family
from transformers_patches.kernels import WeightFormat
from transformers_patches.neurons.fit_file import FitFile
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.load_plan import LayerPlan, LoadPlan
from transformers_patches.sparse.compensation import Compensation
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.sparse.prior import Prior
from transformers_patches.sparse.prompt_selection import PromptSelection
from transformers_patches.sparse.request import RequestLayer, RequestState
from transformers_patches.sparse.selection import Selection
from transformers_patches.sparse.sparse_ffn import SparseFFN
from transformers_patches.sparse.token_selection import TokenSelection
from transformers_patches.weights.source import Source, WeightedSum


def swap_ffns(
    model: PreTrainedModel,
    family: Family,
    plan: LoadPlan,
    settings: PartInferConfig,
    state: RequestState,
    dtype: torch.dtype,
    weight_format: WeightFormat | None,
    *,
    native: bool,
    neurons: NeuronFile | None = None,
    fit: FitFile | None = None,
) -> dict[str, Source]:
    """Put a SparseFFN in place of each planned FFN; where the new parameters come from.

    neurons: the file whose statistics compensation and selection use; fit: set if it is used.
    """
    inputs = {"up": family.up} | ({"gate": family.gate} if family.gated else {})
    sources: dict[str, Source] = {}
    with_threshold = fit is not None and fit.has_thresholds(settings.selection, settings.sparsity)
    for layer, layer_plan in plan.layers.items():
        dense = family.ffn_module(model, layer)
        up, down = getattr(dense, family.up), getattr(dense, family.down)
        layer_fit = None if fit is None else fit.layers[layer]
        with init_empty_weights():
            rows = NeuronRows(
                layer_plan.loaded_count,
                up.in_features,
                family.activation(model.config),
                gated=family.gated,
                input_bias=up.bias is not None,
                weight_format=weight_format,
                native=native,
                paired=settings.selection == "up",
            )
            prior = Prior.of(layer_plan, layer, neurons, layer_fit, with_threshold=with_threshold)
            selection = _selection(settings, rows, layer_plan, prior)
            sparse = SparseFFN(rows, selection, state, output_bias=down.bias is not None).to(dtype)
        family.swap_ffn(family.decoder_layers(model)[layer], sparse)
        place = f"{family.layers}.{layer}.{family.ffn_children[0]}"
        for row, projection in inputs.items():
            prefix = family.projection(layer, projection)
            sources[f"{place}.rows.{row}"] = Source(f"{prefix}.weight", "rows", layer_plan.neurons)
            if up.bias is not None:
                sources[f"{place}.rows.{row}_bias"] = Source(f"{prefix}.bias", "rows", layer_plan.neurons)
        prefix = family.projection(layer, family.down)
        fitted = settings.compensation == "refit"
        sources[f"{place}.rows.down"] = Source(
            f"{prefix}.weight",
            "columns",
            layer_plan.neurons,
            None if fitted else _left_out(settings, layer_plan, layer, neurons, up.in_features),
            layer_fit if fitted else None,
        )
        if down.bias is not None:
            sources[f"{place}.output_bias"] = Source(f"{prefix}.bias")
    return sources


def _selection(settings: PartInferConfig, rows: NeuronRows, plan: LayerPlan, prior: Prior) -> Selection:
    """What chooses the neurons of a layer."""
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


def _left_out(
    settings: PartInferConfig, plan: LayerPlan, layer: int, neurons: NeuronFile | None, hidden_size: int
) -> WeightedSum | None:
    """The sum that becomes the mean compensation of the neurons that are not loaded."""
    if settings.compensation != "mean" or neurons is None:
        return None
    loaded = torch.zeros(neurons.intermediate_size, dtype=torch.bool)
    loaded[plan.neurons] = True
    others = (~loaded).nonzero().squeeze(1)
    return WeightedSum(others, neurons.statistics["mean"][layer][others].float(), torch.zeros(hidden_size))


def attach_compensation(
    layers: list[RequestLayer],
    plan: LoadPlan,
    settings: PartInferConfig,
    sources: dict[str, Source],
    fit: FitFile | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give the SparseFFNs, in the plan's order, what stands in for left out neurons, once all weights are read."""
    sums = [source.left_out for source in sources.values() if source.how == "columns"]
    for layer, ffn, left_out in zip(plan.layers, layers, sums, strict=True):
        if settings.compensation == "refit":
            fitted = fit.layers[layer]
            # what decoding leaves out of a prompt's choice has its own means; a token's choice has the fitted bias
            decode = fitted.bias_decode if settings.selects_per_token else fitted.bias_prefill
            ffn.compensation = Compensation(fitted.bias_prefill.to(device, dtype), decode.to(device, dtype))
        elif left_out is not None:
            bias = left_out.out.to(device, dtype)
            ffn.compensation = Compensation(bias, bias)
