"""Where the weights of a transformers model lie in a GGUF file: by which name, in which rows, and what was changed there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import PretrainedConfig

from transformers_patches.errors import PartInferError
from transformers_patches.families import Family
from transformers_patches.families import family_of as family_of_config
from transformers_patches.weights.gguf_architectures import Architecture
from transformers_patches.weights.gguf_family import missing_biases
from transformers_patches.weights.gguf_file import GGUFFile, StoredTensor
from transformers_patches.weights.gguf_rope import FACTOR_TENSORS
from transformers_patches.weights.gguf_schema import Metadata
from transformers_patches.weights.parts import part_name

# What transformers calls otherwise than the checkpoints that the gguf package knows
_RENAMED = (
    (".router.weight", ".router.layer.weight"),  # Granite's
    (".e_score_correction_bias", ".e_score_correction.bias"),
    (".expert_bias", ".expert_bias.bias"),
    (".sinks", ".sinks.weight"),
    (".dt_bias", ".dt_proj.bias"),
)


@dataclass(frozen=True)
class Place:
    """A weight of the model, or a part of one, and where it lies in the file."""

    stored: str  # the tensor's name in the file
    path: Path | None  # the file; None: it is no tensor there, and all its values are `add`
    shape: tuple[int, ...]  # as PyTorch has it
    kind: GGMLQuantizationType  # how its values are packed
    offset: int  # its first byte in the file
    nbytes: int  # its packed size
    order: Callable[[int], torch.Tensor] | None = None  # from the number of rows to where each lies; None: in its place
    add: float = 0.0  # what undoes the converter's change of a norm
    is_exponential: bool = False  # it is -exp of the model's values

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        return math.prod(self.shape) // self.rows

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows


@dataclass(frozen=True)
class Turns:
    """A weight of the model, or a part of one, whose columns are stored in several tensors and take turns.

    places: the tensors; column i of number t is column i * len(places) + t.
    turned: those columns are the tensors' rows.
    """

    places: tuple[Place, ...]
    turned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.places[0].shape[::-1] if self.turned else self.places[0].shape
        return rows, columns * len(self.places)

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.places)


@dataclass(frozen=True)
class Stack:
    """A weight of the model whose rows are stored in several tensors, one after the other."""

    places: tuple[Place, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(place.rows for place in self.places), self.places[0].columns

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.places)

    def ranges(self) -> Iterator[tuple[Place, range]]:
        """Each tensor, and which rows of the weight it has."""
        first = 0
        for place in self.places:
            yield place, range(first, first + place.rows)
            first += place.rows


def places_of_family(file: GGUFFile, metadata: Metadata, family: Family) -> dict[str, Place]:
    """By names in the model, for architectures with an entry in `families.py`; unknown tensors keep their names."""
    names = family.gguf_names()
    heads = metadata.integer(metadata.of_model("attention.head_count"), low=1)
    kv_heads = metadata.integer(metadata.of_model("attention.head_count_kv"), heads, low=1)
    by_projection = {"attn_q": heads, "attn_k": kv_heads} if family.gguf.rotary_pairs else {}
    found = {
        _name(tensor.name, names, family.layers): _with_changes(file, tensor, by_projection, family.norm_offset)
        for tensor in file.tensors.values()
        if tensor.name not in FACTOR_TENSORS
    }
    for tensor in missing_biases(file, metadata.architecture):
        found[_name(tensor.name, names, family.layers)] = replace(_place(tensor), path=None)
    return found


def places_of_model(
    file: GGUFFile, metadata: Metadata, architecture: Architecture, config: PretrainedConfig
) -> dict[str, Place | Turns | Stack]:
    """By names in the model, for architectures that are found by looking; unknown tensors keep their names."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", 0)}
    by_projection = heads if architecture.rotary_pairs else {}
    found, used = _taking_turns(file, config)
    used |= set(FACTOR_TENSORS)
    stacks, of_stacks = _stacks(file, architecture, config)
    found, used = found | stacks | _values_by_layer(file, metadata, architecture, config), used | of_stacks
    for weight in _wanted(metadata, config):
        tensor = file.tensors.get(weight.stored)
        if tensor is None:
            continue  # what loads the weights says what is missing
        used.add(weight.stored)
        place = _with_changes(file, tensor, by_projection, architecture.norm_offset)
        if architecture.qkv_by_kind and ".attn_qkv." in weight.stored:
            place = replace(place, order=partial(_places_of_heads, heads=config.num_attention_heads))
        if weight.turn is not None:
            found |= _of_experts(place, weight)
            continue
        same = _without_ones(weight.shape) == _without_ones(tensor.shape)  # files may leave out dimensions of 1
        if weight.stored.endswith(".ssm_norm.weight"):  # by group there
            same = math.prod(weight.shape) == math.prod(tensor.shape)
        place = replace(place, is_exponential=weight.stored.endswith(".ssm_a"))
        found[weight.name] = replace(place, shape=weight.shape) if same else place
    unused = [name for name in file.tensors.keys() - used if not _is_beyond(name, config.num_hidden_layers)]
    return found | {name: _place(file.tensors[name]) for name in unused}


def _taking_turns(file: GGUFFile, config: PretrainedConfig) -> tuple[dict[str, Place | Turns], set[str]]:
    """The experts of gpt-oss, and the names that they have in the file; nothing of other models."""
    family = family_of_config(config)
    layout, found, used = family.experts, {}, set()
    if layout is None or not layout.interleaved:
        return found, used
    count, hidden, size = layout.count, layout.hidden, layout.size
    for layer in family.expert_layers(config.num_hidden_layers):
        block, place = f"blk.{layer}.ffn_", f"{family.layers}.{layer}.{family.found.experts}."
        weights = {kind: file.tensors.get(f"{block}{kind}_exps.weight") for kind in ("gate", "up", "down")}
        biases = {kind: file.tensors.get(f"{block}{kind}_exps.bias") for kind in ("gate", "up", "down")}
        shapes = [None if one is None else one.shape for one in (*weights.values(), *biases.values())]
        expected = [(count, size, hidden)] * 2 + [(count, hidden, size)] + [(count, size)] * 2 + [(count, hidden)]
        if shapes != expected:
            continue  # what loads the weights says what is missing
        used |= {tensor.name for tensor in (*weights.values(), *biases.values())}
        gate, up, down = (_by_expert(_place(tensor)) for tensor in weights.values())
        for expert in range(count):
            both = part_name(place + layout.gate_up, expert * hidden, (expert + 1) * hidden)
            found[both] = Turns((gate[expert], up[expert]), turned=True)
            own = part_name(place + layout.down, expert * size, (expert + 1) * size)
            found[own] = Turns((down[expert],), turned=True)
        found[place + layout.gate_up_bias] = Turns((_place(biases["gate"]), _place(biases["up"])), turned=False)
        found[place + layout.down_bias] = _place(biases["down"])
    return found, used


def _stacks(
    file: GGUFFile, architecture: Architecture, config: PretrainedConfig
) -> tuple[dict[str, Place | Stack], set[str]]:
    """Weights whose rows are stored in tensors of other names, and these names."""
    family, found, used = family_of_config(config), {}, set()
    for name, shape in family.found.shapes.items():
        parts = next((parts for end, parts in architecture.stacked.items() if name.endswith(end)), ())
        if not parts:
            continue
        block = f"blk.{name.removeprefix(f'{family.layers}.').partition('.')[0]}"
        tensors = [file.tensors.get(f"{block}.{part}.weight") for part in parts]
        expected = (shape[0] // len(parts), *shape[1:])
        if all(tensor is not None and tensor.shape == expected for tensor in tensors):
            places = tuple(_place(tensor) for tensor in tensors)
            found[name] = Stack(places) if len(places) > 1 else places[0]
            used |= {tensor.name for tensor in tensors}
    return found, used


def _values_by_layer(
    file: GGUFFile, metadata: Metadata, architecture: Architecture, config: PretrainedConfig
) -> dict[str, Place]:
    """Weights of a single value that the metadata have, one for every layer."""
    found, layers = {}, family_of_config(config).layers
    for name, shape in family_of_config(config).found.shapes.items():
        key = next((key for end, key in architecture.by_layer.items() if name.endswith(end)), None)
        if key is None:
            continue
        values = metadata.numbers(key, config.num_hidden_layers)
        if values is None or not np.isfinite(values).all():
            raise metadata.error(key, f"a list of {config.num_hidden_layers} finite numbers")
        value = float(values[int(name.removeprefix(f"{layers}.").partition(".")[0])])
        found[name] = Place(key, None, tuple(shape), GGMLQuantizationType.F32, 0, 0, add=value)
    return found


def _is_beyond(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a block after the layers of the model."""
    match = re.match(r"blk\.(\d+)\.", name)
    return match is not None and int(match[1]) >= layers


@dataclass(frozen=True)
class _Wanted:
    """A weight of the model."""

    stored: str  # its name in the file
    name: str  # in the model
    shape: tuple[int, ...]  # in the model
    turn: int | None = None  # of a weight of all experts: which of the tensors it is that take turns in `name`
    turns: int = 1  # how many take turns


def _wanted(metadata: Metadata, config: PretrainedConfig) -> Iterator[_Wanted]:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[metadata.architecture], config.num_hidden_layers)
    family = family_of_config(config)
    layout, experts = family.experts, f".{family.found.experts}."
    for name, shape in family.found.shapes.items():
        block = f"blk.{name.removeprefix(f'{family.layers}.').partition('.')[0]}"
        if layout is not None and layout.interleaved and experts in name:
            continue
        if layout is not None and name.endswith(experts + layout.gate_up):
            for turn, kind in enumerate(("gate", "up")):
                yield _Wanted(f"{block}.ffn_{kind}_exps.weight", name, shape, turn, 2)
        elif layout is not None and name.endswith(experts + layout.down):
            yield _Wanted(f"{block}.ffn_down_exps.weight", name, shape, 0)
        elif (stored := _stored_name(name, names)) is not None:
            yield _Wanted(stored, name, shape)


def _stored_name(name: str, names: gguf.TensorNameMap) -> str | None:
    """The name in the file of a weight in the model; None if it has none."""
    for known in (*(name.replace(ours, theirs) for ours, theirs in _RENAMED if name.endswith(ours)), name):
        if (stored := names.get_name(known)) is not None:  # without `.weight`
            return stored
        base, _, kind = known.rpartition(".")
        if (stored := names.get_name(base)) is not None:
            return f"{stored}.{kind}"
    return None


def _of_experts(place: Place, weight: _Wanted) -> dict[str, Place]:
    """One place for each expert: a part of the tensor that the model has for all of them."""
    if len(place.shape) != 3:
        return {weight.name: place}  # what loads the weights says that it has another shape
    found, rows = {}, place.shape[1]
    for expert, own in enumerate(_by_expert(place)):
        first = (weight.turns * expert + weight.turn) * rows
        found[part_name(weight.name, first, first + rows)] = own
    return found


def _by_expert(place: Place) -> list[Place]:
    """The matrices of a tensor of three dimensions."""
    count, nbytes = place.shape[0], place.nbytes // place.shape[0]
    offsets = (place.offset + expert * nbytes for expert in range(count))
    return [replace(place, shape=place.shape[1:], offset=offset, nbytes=nbytes) for offset in offsets]


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size > 1]


def _name(name: str, names: dict[str, str], layers: str) -> str:
    """The transformers name; an unknown one stays as it is, and the loader finds no place for it."""
    head, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", head)
    place = names.get(f"blk.{match[2]}" if match else head)
    if place is None:
        return name
    return f"{layers}.{match[1]}.{place}.{kind}" if match else f"{place}.{kind}"


def _place(tensor: StoredTensor) -> Place:
    return Place(tensor.name, tensor.path, tensor.shape, tensor.kind, tensor.offset, tensor.nbytes)


def _with_changes(
    file: GGUFFile, tensor: StoredTensor, heads_by_projection: dict[str, int], norm_offset: float
) -> Place:
    """A whole tensor, with what undoes the converter's changes of its rows' order, and of norms."""
    projection = re.fullmatch(r"blk\.\d+\.(attn_q|attn_k)\.(weight|bias)", tensor.name)
    heads = heads_by_projection.get(projection[1], 0) if projection else 0
    if heads and tensor.shape[0] % (2 * heads):
        raise PartInferError(
            f"{file.path}: the {tensor.shape[0]} rows of {tensor.name} are no pairs of {heads} heads: fetch it again"
        )
    order = partial(_places_of_pairs, heads=heads) if heads else None
    add = -norm_offset if tensor.name.endswith("norm.weight") else 0.0  # the converter adds it to the weights
    return replace(_place(tensor), order=order, add=add)


def _places_of_pairs(rows: int, heads: int) -> torch.Tensor:
    """int64 [rows]: where row r of transformers' layout is in the file, whose heads hold rotary pairs, not halves."""
    half = rows // heads // 2
    return torch.arange(rows).view(heads, half, 2).transpose(1, 2).reshape(rows)


def _places_of_heads(rows: int, heads: int) -> torch.Tensor:
    """int64 [rows]: where row r is in the file, which has all queries, keys and values, not those of one head after the other."""
    return torch.arange(rows).view(3, heads, rows // heads // 3).transpose(0, 1).reshape(rows)
