"""Names of parts of tensors: some rows of a stored tensor under a name of their own.

Where one projection holds the rows of gate and of up, loading asks for `NAME[FIRST:STOP]`, and everything else treats
that as any other tensor: partial loading, quantisation, packs. Tensors of three dimensions count as the matrix that they
are in memory, one after the other.
"""

from __future__ import annotations

import re

_PART = re.compile(r"(.+)\[(\d+):(\d+)\]")


def part_name(name: str, first: int, stop: int) -> str:
    """The name of rows first to stop - 1 of a tensor."""
    return f"{name}[{first}:{stop}]"


def whole_name(name: str) -> str:
    """The name of the tensor that a name is a part of; itself if it is none."""
    match = _PART.fullmatch(name)
    return match[1] if match else name


def rows_of_part(name: str) -> slice | None:
    """Which rows a name stands for; None for all."""
    match = _PART.fullmatch(name)
    return slice(int(match[2]), int(match[3])) if match else None
