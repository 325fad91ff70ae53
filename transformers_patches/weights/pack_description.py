"""What is in a pack: the names of its files and tensors, and its description, pack.json.

A pack is a model folder that holds only the neurons of a load plan. Its files are safetensors shards with their index,
the config, the tokenizer, the neuron files in neurons/, and pack.json. Its tensors are, for a weight called NAME:

NAME                 the weight, if it is read whole.
packed.NAME          [L, …] the planned rows, in the plan's order. Columns are stored as rows.
data.NAME            both in place of the above if the weight is quantised, as QuantizedTensor has them. Down rows are
scales.NAME          stored after a fit has changed them.
column_scales.NAME   [H] the column scales of quantised down rows.
largest.NAME         [H] with float down rows: the largest size in each column, so that loading can quantise them.
left_out.NAME        [H] the weighted sum of the columns that are not there.
neurons.NUMBER       [L] which neurons the rows belong to. Several weights may share a number.

Two weights whose rows are interleaved in memory are one tensor [L, 2, …] under the name of the first; the description
says so (`pair`). Tensors are aligned, so that they can be used where the file is mapped. Tensors that no weight asks
for are ignored, so that later versions can add more.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from transformers_patches.errors import PartInferError
from transformers_patches.weights.aligned_file import PADDING
from transformers_patches.weights.file_kinds import PACK
from transformers_patches.weights.pack_schema import check_description, check_seal, one_line
from transformers_patches.weights.source import WeightedSum

FORMAT, VERSION, READABLE = "partinfer-pack", 7, (1, 2, 3, 4, 5, 6, 7)
DESCRIPTION, NEURONS, INDEX = PACK, "neurons", "model.safetensors.index.json"
LARGEST_DESCRIPTION = 64 * 2**20  # bytes of pack.json; that of a model of 100 layers has 60 kB
ROPE_FACTORS = "rope_factors"  # a tensor of packs whose config lacks the scaling
COLUMN_SCALES, LARGEST = "column_scales", "largest"
ADDED = (  # prefixes of tensors that are not weights of the checkpoint under their own name
    *("packed.", "data.", "scales.", f"{COLUMN_SCALES}.", f"{LARGEST}.", "left_out.", "neurons."),
    PADDING,
    ROPE_FACTORS,
)
FIXED = (  # the settings that decide which neurons a pack holds
    *("loaded_neurons_percent", "base_neurons_percent", "base_neurons_type", "start_num", "end_num", "compensation"),
    "budget",
)
KEPT = ("sparsity", "max_loss")  # defaults for running the pack; older packs have none


def pack_type(folder: str | Path) -> str:
    """The type of a pack's weights, as --dtype names it; PartInferError if its description can't be read."""
    return read_description(folder)["dtype"]


def pack_settings(folder: str | Path) -> dict:
    """The settings in FIXED and KEPT that a pack was made with; PartInferError if its description can't be read."""
    return {name: value for name, value in read_description(folder)["settings"].items() if name in (*FIXED, *KEPT)}


def read_description(folder: str | Path) -> dict:
    """The content of pack.json; older versions are converted to the layout of the current one.

    Raises PartInferError if it can't be read, or if weights have a format that is not known.
    """
    path = Path(folder) / DESCRIPTION
    try:
        if path.stat().st_size > LARGEST_DESCRIPTION:
            raise ValueError(f"it is larger than {LARGEST_DESCRIPTION} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["format"] == FORMAT and type(content["version"]) is int and content["version"] in READABLE
        if not known:
            raise ValueError(f"format {content['format']!r} {content['version']!r}, expected {FORMAT!r} {VERSION}")
        check_seal(content)
        for entry in content["packed"].values():
            if entry.get("bits"):  # before version 6
                entry["format"] = f"int{entry['bits']}"
        check_description(content, FIXED)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PartInferError(f"{path} can't be used: {one_line(error)}; make the pack again") from None
    return content


def checksum_of(left_out: WeightedSum | None) -> int | None:
    """A checksum of which columns are summed up and with which weights: a stored sum fits only if it is the same."""
    if left_out is None:
        return None
    return zlib.crc32(left_out.weights.numpy().tobytes(), zlib.crc32(left_out.columns.numpy().tobytes()))
