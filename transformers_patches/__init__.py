"""The online phase: load a part of the FFN neurons, compute a part of those, on installed transformers classes.

    from transformers_patches import generate, load_model, stream

Names are loaded when they are first used: `import transformers_patches` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib

VERSION = "0.1.0"
_PLACES = {
    "PartInferConfig": "transformers_patches.config",
    "PartInferError": "transformers_patches.errors",
    "GenerationOptions": "transformers_patches.generation.generate",
    "GenerationResult": "transformers_patches.generation.generate",
    "TextModel": "transformers_patches.generation.front_door",
    "generate": "transformers_patches.generation.front_door",
    "load_model": "transformers_patches.generation.front_door",
    "stream": "transformers_patches.generation.front_door",
}
__all__ = ["VERSION", *_PLACES]


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _PLACES.keys())
