"""A run within a bound on the process's memory: sizes from the model's modules, before any weight is read."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import psutil
from transformers import PreTrainedModel

from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.fast_pass.kv_cache import ROOM
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.load.meta_model import build_model
from transformers_patches.modules.quantized import QuantizedWeight, weight_bytes
from transformers_patches.plan.decision import Decision
from transformers_patches.plan.memory import LATER, MB, PER_TOKEN, PROMPT_TOKENS, MemoryNeeds
from transformers_patches.plan.on_demand import why_not_on_demand
from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.request import RequestState
from transformers_patches.weights.memory import give_back_at_once, give_back_freed
from transformers_patches.weights.pack import Pack
from transformers_patches.weights.source import WeightSource

FORMATS = ("int8", "int4")  # from the one that changes the weights least


def in_format_that_fits(
    resolve: Callable[[PartInferConfig], ResolvedRun], settings: PartInferConfig, weights: WeightSource
) -> ResolvedRun:
    """The run in the type of most bits of which everything fits into --memory; the smallest if none does.

    resolve: makes the run of settings. Where there is no bound, or --dtype or a pack has the type, nothing is chosen.
    """
    run, limit = resolve(settings), settings.memory_bytes
    if limit is None or settings.dtype != "auto" or isinstance(weights, Pack) or run.device.type != "cpu":
        return run
    for name in FORMATS:
        most = memory_needs(run, weights).most
        if most <= limit:
            break
        why = f"{run.settings.dtype} would take {most / MB:.0f} MB"
        try:
            run = resolve(replace(settings, dtype=name))
        except PartInferError:  # a model whose rows have no whole groups
            break
        run = replace(run, decisions=run.decisions | {"dtype": Decision(name, why)})
    return run


def within_memory(run: ResolvedRun, weights: WeightSource) -> ResolvedRun:
    """The run with the share of neurons in memory that its bound has room for; as it is without one.

    Raises PartInferError if it can't be kept, with what would do.
    """
    limit = run.settings.memory_bytes
    if limit is None:
        return run
    if run.device.type != "cpu":
        raise PartInferError("--memory bounds a process on the CPU: add --device cpu")
    give_back_at_once()
    needs = memory_needs(run, weights)
    if needs.most <= limit:
        return replace(run, decisions=run.decisions | {"on_demand": Decision("off", "everything fits into --memory")})
    whole = isinstance(weights, Pack) and weights.holds_all_neurons
    why_not = why_not_on_demand(run.settings, run.family, native=run.native, whole_pack=whole)
    if why_not is not None:
        raise PartInferError(
            f"--memory {run.settings.memory} is not enough to load everything, which takes {needs.most / MB:.0f} MB in {run.settings.dtype}, and "
            f"neurons can't be read on demand: {why_not}"
        )
    share = needs.resident(limit)
    decision = Decision("on", f"--memory has room for {share:.1%} of the neurons' rows of gate and down")
    settings = replace(run.settings, on_demand="auto", loaded_neurons_percent=1.0)
    return replace(run, resident=share, settings=settings, decisions=run.decisions | {"on_demand": decision})


def memory_needs(run: ResolvedRun, weights: WeightSource) -> MemoryNeeds:
    """What a run's process needs, with all that can stay in files left there."""
    gc.collect()
    give_back_freed()
    state = RequestState()
    model, _ = build_model(replace(run, resident=None), state)
    rows = [layer.rows for layer in state.layers]
    neurons = [sum(layer.weight(name).nbytes for name in layer.paired_names) for layer in rows]
    config = run.config
    return MemoryNeeds(
        runtime=psutil.Process().memory_info().rss + LATER,
        fixed=weight_bytes(model) - sum(neurons) - bytes_by_row(model, weights),
        neurons=sum(neurons),
        scratch=round(1.04 * max(neurons, default=0)),
        cache=_cache_bytes(run, run.settings.context + ROOM),
        computing=PROMPT_TOKENS * (PER_TOKEN * run.plan.intermediate_size + 16 * config.hidden_size)
        + 8 * config.vocab_size,
    )


def _cache_bytes(run: ResolvedRun, tokens: int) -> int:
    config = run.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * run.dtype.itemsize * tokens


def bytes_by_row(model: PreTrainedModel, weights: WeightSource) -> int:
    """Bytes of weights that are read by row from their file: the embedding, and the low plane of a screened head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None or embedding is head.weight or model.config.tie_word_embeddings:
        return 0
    if not isinstance(weights, Pack):
        return 0 if isinstance(embedding, QuantizedWeight) else embedding.nbytes
    like = head.weight.packed if isinstance(head.weight, QuantizedWeight) else None
    low = like.data.nbytes // 2 if isinstance(like, QuantizedTensor) and like.in_planes else 0
    return embedding.nbytes + low
