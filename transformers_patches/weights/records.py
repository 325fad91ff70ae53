"""The file of a pack from which neurons are read on demand.

A quantised pack has the values and the scales of rows in tensors of their own. Read together they take half as many
reads, so they are written once more, by neuron: `rows_on_demand.bin` holds, behind a header, the records of all layers
one after the other. A record is a neuron's row of gate, its row of down, the scales of both, and padding. Float packs
are laid out like that already.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from transformers_patches.errors import PartInferError
from transformers_patches.files import atomic_path
from transformers_patches.locks import exclusive
from transformers_patches.weights.mapped_files import forget
from transformers_patches.weights.parallel_reads import Read, run, scratch
from transformers_patches.weights.safetensors_folder import Place

NAME = "rows_on_demand.bin"
FORMAT, VERSION = "partinfer-rows", 1
_PAGE = 4096


@dataclass(frozen=True)
class Records:
    """Records of one layer. path: the file. start: their first byte. rows: how many there are."""

    path: Path
    start: int
    rows: int


def records_of(folder: Path, checksum: str, pairs: list[list[Place]], record: int) -> list[Records]:
    """Where the records of each layer are, written first if they are not there yet.

    checksum: of the pack, which a file that belongs to it names. pairs: by layer, as Pack.pair gives them. record: bytes.
    """
    if all(len(pair) == 1 and pair[0].row_bytes == record for pair in pairs):
        return [Records(place.path, place.start, place.rows) for (place,) in pairs]
    header, starts = _header(checksum, pairs, record)
    path = folder / NAME
    if not _is_ours(path, header, starts[-1]):
        try:
            with exclusive(path, wait=True):
                if not _is_ours(path, header, starts[-1]):
                    _write(path, header, pairs, record)
        except OSError as error:
            raise PartInferError(
                f"{path} can't be written: {error.strerror or error}; neurons of a quantised pack are read on demand from it"
            ) from None
    return [Records(path, start, pair[0].rows) for start, pair in zip(starts, pairs, strict=False)]


def _header(checksum: str, pairs: list[list[Place]], record: int) -> tuple[bytes, list[int]]:
    """The file's first pages, and where each layer begins and the last one ends."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "pack": checksum,
        "record": record,
        "rows": [p[0].rows for p in pairs],
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % _PAGE)
    starts = [len(text)]
    for pair in pairs:
        starts.append(starts[-1] + pair[0].rows * record)
    return text, starts


def _is_ours(path: Path, header: bytes, size: int) -> bool:
    try:
        with open(path, "rb") as file:
            return path.stat().st_size == size and file.read(len(header)) == header
    except OSError:
        return False


def _write(path: Path, header: bytes, pairs: list[list[Place]], record: int) -> None:
    """One layer after the other, so that one layer's rows are in memory."""
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(header)
            for pair in pairs:
                records, place = torch.zeros(pair[0].rows, record, dtype=torch.uint8), 0
                for stored in pair:
                    held = scratch((stored.nbytes,), torch.uint8)
                    run([Read(stored.path, stored.start, stored.nbytes, held)])
                    records[:, place : place + stored.row_bytes] = held.view(stored.rows, stored.row_bytes)
                    place += stored.row_bytes
                file.write(records.numpy())
        forget(temporary)
