"""Modules whose parameters have no memory, and are not initialised: they are about to be read from files."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

Built = TypeVar("Built")
INITIALISED_BY_THEMSELVES = (nn.Linear, nn.Embedding)


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters made in the block are on the meta device, and nobody draws numbers for them; buffers are real.

    The idea of accelerate's `init_empty_weights`, which takes longer to import than all modules take to build.
    `_is_hf_initialized` tells transformers that a parameter has its values. Not for several threads at once.
    """
    register = nn.Module.register_parameter
    resets = {kind: kind.reset_parameters for kind in INITIALISED_BY_THEMSELVES}

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            empty = type(parameter)(parameter.to("meta"), requires_grad=parameter.requires_grad)
            empty.__dict__.update(parameter.__dict__)
            empty._is_hf_initialized = True
            module._parameters[name] = empty

    nn.Module.register_parameter = on_meta
    for kind in resets:
        kind.reset_parameters = lambda module: None
    try:
        yield
    finally:
        nn.Module.register_parameter = register
        for kind, reset in resets.items():
            kind.reset_parameters = reset


def built(build: Callable[[], Built]) -> Built:
    """What `build` builds `without_memory`; once more if that needs kernels for meta tensors that are not loaded."""
    try:
        with without_memory():
            return build()
    except NotImplementedError:
        vars(importlib.import_module("torch._meta_registrations").activate_meta)  # asking loads what was put off
        with without_memory():
            return build()
