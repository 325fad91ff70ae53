"""What the processes of `accelerate launch` tell each other; alone, a process keeps what it has."""

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
    """`total` of each of them; the names are the same in every process."""
    return {name: total(part, processes) for name, part in values.items()}


def total(values: torch.Tensor, processes: PartialState) -> torch.Tensor:
    """The sum of all processes' tensors, on the CPU, in every process."""
    if processes.num_processes == 1:
        return values
    with _others_may_fail():
        return reduce(values.to(processes.device), "sum").cpu()


def joined(values: list, processes: PartialState) -> list:
    """All processes' lists, one after the other, in every process."""
    if processes.num_processes == 1:
        return values
    with _others_may_fail():
        return gather_object(values)


@contextmanager
def _others_may_fail() -> Iterator[None]:
    """When another process ends early, torch.distributed raises RuntimeError here; the other has said what it was."""
    try:
        yield
    except RuntimeError as error:
        raise PartInferError(f"another process of this run stopped: {str(error).splitlines()[0][:200]}") from None
