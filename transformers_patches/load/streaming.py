"""Weights from a checkpoint into the memory of a model that has none yet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from transformers_patches.errors import PartInferError
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.load.as_stored import names_in_model
from transformers_patches.load.column_weights import column_weights
from transformers_patches.modules.quantized import QuantizedEmbedding, QuantizedWeight, weight_places
from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.by_input_linear import ByInputLinear, Joined
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.weights.memory import WeightMemory
from transformers_patches.weights.source import Source, WeightSource


@dataclass(frozen=True)
class _Wanted:
    """A weight that is read."""

    name: str  # in the model
    place: nn.Parameter | QuantizedWeight  # what holds it, still without memory
    source: Source  # in the checkpoint, by its name there
    in_plan: bool  # of neurons that the plan loads, not of a module that stays whole


def stream_weights(
    model: PreTrainedModel, weights: WeightSource, sources: dict[str, Source], run: ResolvedRun, memory: WeightMemory
) -> None:
    """Give every parameter memory on its device, and read it.

    sources: where parameters come from that the checkpoint does not have under their own name. Raises PartInferError if
    anything is left over on either side.
    """
    wanted = _wanted(model, weights, sources, run)

    def requests() -> Iterator[tuple[Source, torch.Tensor | QuantizedTensor]]:
        for weight in wanted:
            held = _memory_for(model, weight, weights, run, memory)
            _hold(model, weight.name, weight.place, held)
            yield weight.source, held

    weights.fill(requests())
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            continue  # where it was read to, and tied already
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(run.device))
    if not isinstance(model.get_input_embeddings(), QuantizedEmbedding):
        model.tie_weights()
    left = [name for name, place in weight_places(model) if place.device.type == "meta"]
    if left:
        raise PartInferError(
            f"{weights.source}: {left[0]} was not loaded: the checkpoint is incomplete, fetch it again"
        )


def _wanted(
    model: PreTrainedModel, weights: WeightSource, sources: dict[str, Source], run: ResolvedRun
) -> list[_Wanted]:
    """All weights of the model, tied ones once. PartInferError unless the checkpoint has these, and nothing else."""
    names = names_in_model(weights, model.config)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    head = "lm_head.weight" if not tied else model.all_tied_weights_keys["lm_head.weight"]
    important = column_weights(run.family, None if run.weight_format is None else run.base, head)
    wanted, used = [], set()
    for name, place in weight_places(model):
        source = sources.get(name, Source(name))
        stored = names.get(source.name)
        if stored is None:
            if name in tied:
                continue
            raise PartInferError(f"{weights.source} lacks {source.name}: the checkpoint is incomplete, fetch it again")
        used.add(stored)
        if name not in tied:  # else the same tensor as its partner, which is read
            _check_shape(weights, stored, _expected_shape(model, name, place, source, run.plan.intermediate_size))
            of_columns = important.get(source.name) if _has_weighted_errors(place, source) else None
            in_plan = name in sources and source.how != "whole"
            wanted.append(_Wanted(name, place, replace(source, name=stored, column_weights=of_columns), in_plan))
    _check_all_used(model, weights, {name for name, stored in names.items() if stored not in used})
    return wanted


def _check_all_used(model: PreTrainedModel, weights: WeightSource, unused: set[str]) -> None:
    ignored = [re.compile(p) for p in (r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ()))]
    unexpected = sorted(name for name in unused if not any(pattern.search(name) for pattern in ignored))
    if unexpected:
        raise PartInferError(f"{weights.source} has {unexpected[0]}, which {model.config.model_type} has no place for")


def _has_weighted_errors(place: nn.Parameter | QuantizedWeight, source: Source) -> bool:
    """Whether columns of a weight are inputs. Columns that become rows are outputs."""
    return isinstance(place, QuantizedWeight) and source.how != "columns"


def _is_paired(model: PreTrainedModel, name: str) -> bool:
    """Whether the rows of a weight are interleaved with another's in memory."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    return isinstance(module, NeuronRows) and leaf in module.paired_names


def _joined(model: PreTrainedModel, name: str) -> Joined | None:
    """Which weights have their rows next to this one's in memory."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    return module.joined if isinstance(module, ByInputLinear) and leaf == "weight" else None


def _memory_for(
    model: PreTrainedModel, weight: _Wanted, weights: WeightSource, run: ResolvedRun, memory: WeightMemory
) -> torch.Tensor | QuantizedTensor:
    """Memory for a weight: where the checkpoint's file is mapped, if that will do; else new memory, not yet filled."""
    on_cpu = run.device.type == "cpu" or (run.settings.memory_limit and weight.in_plan)
    target = torch.device("cpu") if on_cpu else run.device
    pinned = target.type == "cpu" and run.device.type == "cuda"
    paired = target.type == "cpu" and not pinned and _is_paired(model, weight.name)
    joined = None if paired or target.type != "cpu" or pinned else _joined(model, weight.name)
    like = weight.place.packed if isinstance(weight.place, QuantizedWeight) else weight.place
    if memory.huge_pages and target.type == "cpu":
        held = weights.mapped(weight.source, like, paired=paired)
        if held is not None:
            return held

    def empty(like: torch.Tensor) -> torch.Tensor:
        if paired:  # with the other paired weight of its module
            return memory.empty_paired((weight.name.rpartition(".")[0], like.dtype), like.shape, like.dtype)
        if joined is not None:
            widths = [like.shape[1] * outputs // joined.outputs[joined.number] for outputs in joined.outputs]
            return memory.empty_joined((joined.group, like.dtype), like.shape[0], widths, joined.number, like.dtype)
        return memory.empty(like.shape, like.dtype, target)

    values = like.like(empty) if isinstance(like, QuantizedTensor) else empty(like)
    return values.pin_memory() if pinned else values


def _hold(
    model: PreTrainedModel, name: str, place: nn.Parameter | QuantizedWeight, values: torch.Tensor | QuantizedTensor
) -> None:
    """Make a weight of the model refer to this memory."""
    if isinstance(place, QuantizedWeight):
        place.fill(values)
        return
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))


def _expected_shape(
    model: PreTrainedModel, name: str, place: nn.Parameter | QuantizedWeight, source: Source, intermediate_size: int
) -> tuple[int, ...]:
    """The shape that the checkpoint must have a weight in."""
    shape = tuple(place.shape)
    if source.how == "rows":
        return (intermediate_size, *shape[1:])
    if source.how == "columns":
        return (shape[1], shape[0] if _is_by_input(model, name) else intermediate_size)
    return shape


def _is_by_input(model: PreTrainedModel, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    return isinstance(module, ByInputLinear) or (isinstance(module, NeuronRows) and module.up_by_input and leaf == "up")


def _check_shape(weights: WeightSource, stored: str, expected: tuple[int, ...]) -> None:
    """Rows and columns were chosen by the config; a file of another size must not be read with them."""
    shape = weights.shape(stored)
    if shape != expected:
        raise PartInferError(f"{weights.source}: {stored} has shape {shape}, its config.json says {expected}")
