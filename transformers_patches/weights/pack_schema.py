"""Whether a pack's description and its tensors are what they should be, before anything is read by them.

pack.json carries a checksum of itself since version 7. Whatever its version, its values must have their types, and the
shapes and types of the tensors must follow from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection

import torch

from transformers_patches import kernels
from transformers_patches.config import BASE_NEURONS_TYPES, BUDGETS, COMPENSATIONS, FLOAT_DTYPES
from transformers_patches.weights.safetensors_folder import Place

CHECKSUM = "checksum"
HOW = ("whole", "rows", "columns")
SEALED_SINCE = 7  # the first version whose descriptions have a checksum
COLUMN_SCALES_SINCE = 5  # the first version that stores column scales, and what they are made from


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_fraction(value: object) -> bool:
    return value is None or (_is_number(value) and 0 <= value <= 1)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_text_or_number(value: object) -> bool:
    return value is None or isinstance(value, str) or _is_number(value)


SETTINGS = {
    **dict.fromkeys(
        ("loaded_neurons_percent", "base_neurons_percent", "sparsity"), (_is_fraction, "a fraction from 0 to 1")
    ),
    **dict.fromkeys(("start_num", "end_num"), (_is_count, "the number of a layer")),
    "base_neurons_type": (lambda value: value in BASE_NEURONS_TYPES, f"one of {', '.join(BASE_NEURONS_TYPES)}"),
    "compensation": (lambda value: value in COMPENSATIONS, f"one of {', '.join(COMPENSATIONS)}"),
    "budget": (lambda value: value in BUDGETS, f"one of {', '.join(BUDGETS)}"),
}


def seal(description: dict) -> dict:
    """The description with the checksum of its content."""
    return {**description, CHECKSUM: _checksum(description)}


def _checksum(description: dict) -> str:
    content = {name: value for name, value in description.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_seal(content: dict) -> None:
    """Raise ValueError if the description is not what was written. Before version 7, it may have no checksum."""
    if content["version"] >= SEALED_SINCE or CHECKSUM in content:
        _expect(content.get(CHECKSUM) == _checksum(content), "it was changed after the pack was made")


def one_line(error: Exception) -> str:
    """An exception as a short line."""
    text = " ".join(str(error).split())[:200]
    return f"no {text}" if isinstance(error, KeyError) else text or type(error).__name__


def check_description(content: dict, settings: Collection[str]) -> None:
    """Raise ValueError unless a description of the current layout is complete and its values have their types.

    settings: the names of settings that it must have.
    """
    made = content["settings"]
    missing = [name for name in settings if name not in made]
    _expect(not missing, f"its settings lack {missing[:1]}")
    for name, value in made.items():
        fits, expected = SETTINGS.get(name, (_is_text_or_number, "a text, a number or null"))
        _expect(fits(value), f"its setting {name} is {value!r}, not {expected}")
    for name in ("dtype", "head_dtype"):
        value = content.get(name, "auto")
        _expect(name != "dtype" or value != "auto", f"{name} is {value!r}")
        if value not in FLOAT_DTYPES:
            kernels.format_named(value)
    _expect(_is_count(content["bytes_dense"]), f"bytes_dense is {content['bytes_dense']!r}")
    for name, shape in content["elsewhere"].items():
        _expect(_is_shape(shape), f"the shape of {name} is {shape!r}")
    for name, entry in content["packed"].items():
        _check_entry(name, entry)
    _check_pairs(content["packed"])


def _check_entry(name: str, entry: dict) -> None:
    how, shape, neurons = entry["how"], entry["shape"], entry["neurons"]
    _expect(how in HOW, f"{name} is read {how!r}")
    _expect(_is_shape(shape), f"the shape of {name} is {shape!r}")
    _expect(len(shape) >= (1 if how == "rows" else 2), f"{name} has the shape {shape}")
    _expect(neurons is None if how == "whole" else _is_count(neurons), f"{name} has the neurons {neurons!r}")
    _expect(entry["left_out"] is None or _is_count(entry["left_out"]), f"left_out of {name} is {entry['left_out']!r}")
    if "format" in entry:
        fits = shape[-1 if how != "columns" else 0] % kernels.format_named(entry["format"]).group == 0
        _expect(len(shape) == 2 and fits, f"{name} {shape} can't be {entry['format']}")
        _expect(isinstance(entry["refitted"], bool), f"refitted of {name} is {entry['refitted']!r}")


def _check_pairs(packed: dict[str, dict]) -> None:
    """For weights whose rows are interleaved: both halves are there, and alike."""
    halves = defaultdict(dict)
    for name, entry in packed.items():
        if "pair" in entry:
            half = entry["pair"]["half"]
            _expect(type(half) is int and half in (0, 1), f"{name} is half {half!r} of a pair")
            _expect(half not in halves[entry["pair"]["first"]], f"{name} is half {half} of a pair, as another is")
            halves[entry["pair"]["first"]][half] = name
    for first, names in halves.items():
        _expect(names.get(0) == first and 1 in names, f"one of the pair of {first} is missing")
        stored = [{key: packed[n].get(key) for key in ("neurons", "shape", "how", "format")} for n in names.values()]
        rows = [_row_shape(packed[name]) for name in names.values()]
        alike = rows[0] == rows[1] and all(stored[0][key] == stored[1][key] for key in ("neurons", "format"))
        _expect(alike, f"the pair of {first} does not fit together")


def check_tensors(content: dict, names: Collection[str], place_of: Callable[[str], Place]) -> None:
    """Raise ValueError unless the tensors of a pack have the shapes and types that follow from its description.

    names: of all tensors.
    place_of: gives a tensor's place by its name; raises PartInferError for one that is not there.
    """
    for name, entry in content["packed"].items():
        row, rows = _row_shape(entry), entry["shape"][0]
        if entry["how"] != "whole":
            neurons = place_of(f"neurons.{entry['neurons']}")
            _expect(len(neurons.shape) == 1 and neurons.dtype in (torch.int32, torch.int64), f"{name}: odd neurons")
            rows, all_rows = neurons.rows, entry["shape"][0 if entry["how"] == "rows" else 1]
            _expect(rows <= all_rows, f"{name} has {all_rows} neurons, {rows} of them are listed")
        pair = entry.get("pair")
        stored = name if pair is None else pair["first"]
        between = (rows,) if pair is None else (rows, 2)
        if "format" in entry:
            data, scales = kernels.format_named(entry["format"]).empty(1, row[0], "meta")
            planes = ((2, rows, row[0] // 2), torch.uint8)
            _check_place(place_of(f"data.{stored}"), ((*between, *data.shape[1:]), data.dtype), planes)
            _check_place(place_of(f"scales.{stored}"), ((*between, *scales.shape[1:]), scales.dtype))
        else:
            place = place_of(f"packed.{stored}")
            _expect(place.dtype.is_floating_point, f"packed.{stored} has the type {place.dtype}")
            _check_place(place, ((*between, *row), place.dtype))
        _check_beside(content["version"], name, entry, names, place_of)


def _check_beside(
    version: int, name: str, entry: dict, names: Collection[str], place_of: Callable[[str], Place]
) -> None:
    """The vectors that belong to a weight."""
    kinds = ["column_scales" if "format" in entry else "largest"] if entry["how"] == "columns" else []
    needed = set(kinds if version >= COLUMN_SCALES_SINCE else ()) | (
        {"left_out"} if entry["left_out"] is not None else set()
    )
    for kind in {*kinds, *needed}:
        if kind in needed or f"{kind}.{name}" in names:
            _check_place(place_of(f"{kind}.{name}"), (_row_shape(entry), torch.float32))


def _row_shape(entry: dict) -> tuple[int, ...]:
    """The shape of a row in memory: columns become rows."""
    shape = entry["shape"]
    return (shape[0],) if entry["how"] == "columns" else tuple(shape[1:])


def _check_place(place: Place, *expected: tuple[tuple[int, ...], torch.dtype]) -> None:
    if (place.shape, place.dtype) not in expected:
        shape, dtype = expected[0]
        raise ValueError(f"{place.path.name} has a tensor {list(place.shape)} {place.dtype}, not {list(shape)} {dtype}")


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(_is_count(size) for size in value) and math.prod(value) < 2**63


def _expect(holds: bool, wrong: str) -> None:
    if not holds:
        raise ValueError(wrong)
