"""Importing transformers without what it imports and this project never uses, for processes with a bound on memory.

transformers' modules for models import SciPy (for losses of object detection), PyTorch's compiler (for decorators that
mark functions for it) and its distributed tensors, with SymPy behind both: over 100 MB. While `light_imports` is
in force they look as if they were not installed; those of torch.compile are stood in for, and torch.compile is as it
was afterwards. Only for a process of our own programs: nothing that has been imported like this can compile models.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator

_ABSENT = ("is_scipy_available", "is_sklearn_available", "is_vision_available", "is_torchvision_available")
_DYNAMO = "torch._dynamo"
_TRACED = f"{_DYNAMO}._trace_wrapped_higher_order_op"


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """Within this block, transformers imports less. Does nothing once transformers' models have been imported."""
    if "transformers.modeling_utils" in sys.modules or _DYNAMO in sys.modules:
        yield
        return
    import torch
    import torch.distributed
    from transformers import utils
    from transformers.utils import import_utils

    places = [(module, name) for module in (utils, import_utils) for name in _ABSENT if hasattr(module, name)]
    places += [(torch.compiler, "disable"), (torch, "compile"), (torch.distributed, "is_available")]
    kept = [(module, name, getattr(module, name)) for module, name in places]
    for module, name in places:
        setattr(module, name, _unchanged if module in (torch, torch.compiler) else _no)
    sys.modules |= {_DYNAMO: _decorators(_DYNAMO), _TRACED: _decorators(_TRACED)}
    torch._dynamo = sys.modules[_DYNAMO]
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
        del sys.modules[_DYNAMO], sys.modules[_TRACED], torch._dynamo


def _no(*_arguments: object, **_options: object) -> bool:
    return False


def _unchanged(function: object = None, *_arguments: object, **_options: object) -> object:
    """As a decorator, with or without arguments: the function itself."""
    return function if function is not None else lambda one: one


def _decorators(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []
    module.assume_constant_result = module.allow_in_graph = module.disable = _unchanged
    module.TransformGetItemToIndex = contextlib.nullcontext
    return module
