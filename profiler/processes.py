"""Exchanges between the processes of `accelerate launch`. A single process just keeps its values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

from transformers_patches.errors import PartInferError


def from_main(value: object, processes: PartialState) -> object:
    """The main process's value, in every process."""
    if processes.num_processes == 1:
        return value
    with _others_may_fail():
        return broadcast_object_list([value])[0]


def totals(values: dict[str, torch.Tensor], processes: PartialState) -> dict[str, torch.Tensor]:
    """`total` of each tensor. All processes must have the same names."""
    return {name: total(part, processes) for name, part in values.items()}


def total(values: torch.Tensor, processes: PartialState) -> torch.Tensor:
    """The sum of all processes' tensors, on the CPU, in every process (of one process: the tensor as it is)."""
    if processes.num_processes == 1:
        return values
    with _others_may_fail():
        return reduce(values.to(processes.device), "sum").cpu()


def joined(values: list, processes: PartialState) -> list:
    """The lists of all processes joined together, in every process."""
    if processes.num_processes == 1:
        return values
    with _others_may_fail():
        return gather_object(values)


@contextmanager
def _others_may_fail() -> Iterator[None]:
    """Turn the RuntimeError that torch.distributed raises when another process ends early into a PartInferError."""
    try:
        yield
    except RuntimeError as error:
        raise PartInferError(f"another process of this run stopped: {str(error).splitlines()[0][:200]}") from None
