"""Weights from a checkpoint into the memory of a model that has none yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from transformers_patches.errors import PartInferError
from transformers_patches.kernels import QuantizedTensor
from transformers_patches.load.as_stored import names_in_model
from transformers_patches.load.column_weights import column_weights
from transformers_patches.load.on_demand import RowsOnDemand
from transformers_patches.modules.quantized import QuantizedEmbedding, QuantizedWeight, weight_places
from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.by_input_linear import ByInputLinear, Joined
from transformers_patches.sparse.neuron_rows import NeuronRows
from transformers_patches.sparse.rows_on_demand import OnDemandRows
from transformers_patches.weights.by_row import RowsInFile
from transformers_patches.weights.memory import WeightMemory
from transformers_patches.weights.parts import rows_of_part, whole_name
from transformers_patches.weights.source import Source, WeightSource

Progress = Callable[[Iterable], Iterable]  # iterates over things, and may show how far that is


@dataclass(frozen=True)
class KeptOnDisk:
    """The weights of a model that are not all in memory: read by row, and read when tokens choose neurons."""

    by_row: RowsInFile
    on_demand: RowsOnDemand

    @property
    def nbytes(self) -> int:
        """How much of them is not in memory."""
        return self.by_row.nbytes + self.on_demand.nbytes

    def check_unchanged(self) -> None:
        """Raise PartInferError if one of the files was written to since."""
        self.by_row.check_unchanged()
        self.on_demand.check_unchanged()


@dataclass(frozen=True)
class _Wanted:
    """A weight that is read."""

    name: str  # in the model
    place: torch.Tensor | QuantizedWeight  # what holds it: a parameter without memory, or a buffer
    source: Source  # in the checkpoint, by its name there
    in_plan: bool  # of neurons that the plan loads, not of a module that stays whole
    parts: tuple[tuple[str, slice], ...] = ()  # where it is not stored in one piece: names in the checkpoint, and rows


def stream_weights(
    model: PreTrainedModel,
    weights: WeightSource,
    sources: dict[str, Source],
    run: ResolvedRun,
    memory: WeightMemory,
    progress: Progress = iter,
) -> KeptOnDisk:
    """Give every parameter memory on its device, and read it. Returns the weights that stay in their files.

    sources: where parameters come from that the checkpoint does not have under their own name. progress: iterates over the
    weights, and may show how far that is. Raises PartInferError if anything is left over on either side.
    """
    wanted, kept = _wanted(model, weights, sources, run), KeptOnDisk(RowsInFile(), RowsOnDemand())
    by_row = _read_by_row(model, run)
    on_demand = {weight.name: weight.source for weight in wanted if _is_on_demand(model, weight.name)}

    def requests() -> Iterator[tuple[Source, torch.Tensor | QuantizedTensor]]:
        for weight in progress(wanted):
            if weight.name in on_demand:
                continue
            if weight.name in by_row and not weight.parts:
                held = weights.by_row(weight.source, _like(weight.place), kept.by_row)
                if held is not None:
                    _hold(model, weight.name, weight.place, held)
                    continue
            held = _memory_for(model, weight, weights, run, memory)
            _hold(model, weight.name, weight.place, held)
            yield from _reads(weight, held)

    weights.fill(requests())
    if on_demand:
        kept.on_demand.attach(model, weights, on_demand, run)
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
    return kept


def _is_on_demand(model: PreTrainedModel, name: str) -> bool:
    """Whether the rows of a weight are read when tokens choose them."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    return isinstance(module, OnDemandRows) and leaf in module.paired_names


def _read_by_row(model: PreTrainedModel, run: ResolvedRun) -> set[str]:
    """Names of weights of which a token reads a few rows: the embedding, unless it is the output projection as well.

    With a bound on memory also a screened head, of which the low plane then stays in the file.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if run.device.type != "cpu" or head is None or embedding is head.weight or model.config.tie_word_embeddings:
        return set()
    wanted = [embedding]
    if run.settings.memory is not None and isinstance(head.weight, QuantizedWeight) and head.weight.packed.in_planes:
        wanted.append(head.weight)
    return {name for name, place in weight_places(model) if any(place is one for one in wanted)}


def _like(place: torch.Tensor | QuantizedWeight) -> torch.Tensor | QuantizedTensor:
    return place.packed if isinstance(place, QuantizedWeight) else place


def _reads(
    weight: _Wanted, held: torch.Tensor | QuantizedTensor
) -> Iterator[tuple[Source, torch.Tensor | QuantizedTensor]]:
    if not weight.parts:
        yield weight.source, held
    for name, rows in weight.parts:
        yield Source(name), held.flatten(0, 1)[rows]


def _wanted(
    model: PreTrainedModel, weights: WeightSource, sources: dict[str, Source], run: ResolvedRun
) -> list[_Wanted]:
    """All weights of the model, tied ones once. PartInferError unless the checkpoint has these, and nothing else."""
    names, places = names_in_model(weights, model.config), weight_places(model)
    buffers = _kept_buffers(model)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    head = "lm_head.weight" if not tied else model.all_tied_weights_keys["lm_head.weight"]
    important = column_weights(run.family, None if run.weight_format is None else run.base, head)
    wanted, used, parts = [], set(), _parts_by_tensor(names)
    for name, place in (*places, *buffers.items()):
        source = sources.get(name, Source(name))
        whole = whole_name(source.name)
        if whole == source.name and whole in parts:
            used |= {names[part] for part in parts[whole]}
            wanted.append(_in_parts(weights, names, name, place, parts[whole]))
            continue
        if whole not in names and source.name not in names:
            if name in tied or name in buffers:
                continue  # files of before a buffer was kept leave it as it is
            raise PartInferError(f"{weights.source} lacks {whole}: the checkpoint is incomplete, fetch it again")
        stored = names.get(source.name) or names[whole] + source.name.removeprefix(whole)
        used.add(names.get(source.name, names.get(whole)))
        if name not in tied:  # else the same tensor as its partner, which is read
            _check_shape(weights, stored, place.shape, source.how, source.size or run.plan.intermediate_size)
            of_columns = important.get(whole) if _has_weighted_errors(place, source) else None
            in_plan = name in sources and source.how != "whole"
            wanted.append(_Wanted(name, place, replace(source, name=stored, column_weights=of_columns), in_plan))
    _check_all_used(model, weights, {name for name, stored in names.items() if stored not in used})
    return wanted


def _parts_by_tensor(names: dict[str, str]) -> dict[str, list[str]]:
    """The parts that tensors are stored in, by the tensors' names."""
    parts: dict[str, list[str]] = {}
    for name in names:
        if whole_name(name) != name:
            parts.setdefault(whole_name(name), []).append(name)
    return parts


def _in_parts(
    weights: WeightSource, names: dict[str, str], name: str, place: torch.Tensor, parts: list[str]
) -> _Wanted:
    """A tensor of all experts from those of each. PartInferError unless they make it up."""
    rows = sorted(((rows_of_part(part), names[part]) for part in parts), key=lambda one: one[0].start)
    end = 0
    for one, stored in rows:
        if one.start != end or weights.shape(stored) != (one.stop - one.start, *place.shape[2:]):
            break
        end = one.stop
    if end != place.shape[0] * place.shape[1]:
        raise PartInferError(
            f"{weights.source}: {name} {tuple(place.shape)} can't be put together from the {len(rows)} tensors of its "
            "experts: the checkpoint is incomplete, fetch it again"
        )
    return _Wanted(name, place, Source(name), False, tuple((stored, one) for one, stored in rows))


def _kept_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers that belong into checkpoints, by name; not the data of quantised weights."""
    modules = [(name, m) for name, m in model.named_modules() if not isinstance(m, QuantizedWeight)]
    return {
        f"{place}.{name}" if place else name: buffer
        for place, module in modules
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _check_all_used(model: PreTrainedModel, weights: WeightSource, unused: set[str]) -> None:
    ignored = [re.compile(p) for p in (r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ()))]
    unexpected = sorted(name for name in unused if not any(pattern.search(name) for pattern in ignored))
    if unexpected:
        raise PartInferError(f"{weights.source} has {unexpected[0]}, which {model.config.model_type} has no place for")


def _has_weighted_errors(place: torch.Tensor | QuantizedWeight, source: Source) -> bool:
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
    like = _like(weight.place)
    may_be_mapped = (
        memory.huge_pages and run.resident is None and run.settings.memory is None
    )  # mapped pages come with neighbours, beyond any bound
    if may_be_mapped and target.type == "cpu" and not weight.parts:
        held = weights.mapped(weight.source, like, paired=paired)
        if held is not None:
            return held

    def empty(like: torch.Tensor) -> torch.Tensor:
        if pinned:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        if paired:  # with the other paired weight of its module
            return memory.empty_paired((weight.name.rpartition(".")[0], like.dtype), like.shape, like.dtype)
        if joined is not None:
            widths = [like.shape[1] * outputs // joined.outputs[joined.number] for outputs in joined.outputs]
            return memory.empty_joined((joined.group, like.dtype), like.shape[0], widths, joined.number, like.dtype)
        return memory.empty(like.shape, like.dtype, target)

    return like.like(empty) if isinstance(like, QuantizedTensor) else empty(like)


def _hold(
    model: PreTrainedModel, name: str, place: torch.Tensor | QuantizedWeight, values: torch.Tensor | QuantizedTensor
) -> None:
    """Make a weight of the model refer to this memory."""
    if isinstance(place, QuantizedWeight):
        place.fill(values)
        return
    parent, _, leaf = name.rpartition(".")
    held = nn.Parameter(values, requires_grad=False) if isinstance(place, nn.Parameter) else values
    setattr(model.get_submodule(parent), leaf, held)


def _check_shape(
    weights: WeightSource, stored: str, expected: tuple[int, ...], how: str, intermediate_size: int
) -> None:
    """Rows and columns were chosen by the config; a file of another size must not be read with them."""
    expected = tuple(expected)
    if how == "rows":
        expected = (intermediate_size, *expected[1:])
    elif how == "columns":
        expected = (expected[1], intermediate_size)
    shape = weights.shape(stored)
    if shape != expected:
        raise PartInferError(f"{weights.source}: {stored} has shape {shape}, its config.json says {expected}")
