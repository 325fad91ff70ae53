"""What torch and transformers import but no answer needs stays unloaded until somebody asks for it.

For the process of a command only (`partinfer.py`), never for programs that use this as a library: `begin` changes what
other code finds. Half of the time that `import torch, transformers` takes goes into compilers, graphs of operations and
distributed training. Five rules, each with a mechanism of Python's own:

* PACKAGES that transformers can do without are not found: `None` in sys.modules.
* MODULES that are imported for their side are put off: an importlib loader that executes them when an attribute of
  theirs is first asked for. torch registers its kernels for meta tensors in one of them: models are built without
  (`structure/empty_model.py`), or it is loaded then.
* The list of all names in transformers, read from two thousand files at every start, is kept in the cache folder.
* Garbage is not looked for while imports make hundreds of thousands of objects that stay (`import_ahead` to `imported`).
* torch's libraries are loaded by a second thread while Python imports what does not need them (`import_ahead`).

Whatever is not as expected here is imported as always, only more slowly.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace

from transformers_patches.files import cache_folder, write_text_atomic

PACKAGES = ("scipy", "sklearn", "pandas", "PIL", "accelerate", "matplotlib", "torchvision", "torchaudio")
META_KERNELS = "torch._meta_registrations"
COMPILER = "torch._dynamo"
MODULES = (COMPILER, META_KERNELS, "torch.export", "torch._export")
EXTENSIONS = ("asyncio", "queue", "uuid", "numpy", "regex", "safetensors", "tokenizers", "yaml", "jinja2", "tqdm")
NAMES = "transformers.utils.import_utils"  # the module that lists transformers' names

_begun = False


def begin() -> None:
    """Put off what is not needed, in this process from now on. Does nothing once torch or transformers is there."""
    global _begun
    if _begun or "torch" in sys.modules or "transformers" in sys.modules:
        return
    _begun = True
    for name in PACKAGES:
        sys.modules.setdefault(name, None)
    sys.meta_path.insert(0, _Finder())


def import_ahead() -> None:
    """Import what comes before torch, while a second thread loads torch's libraries. Does nothing before `begin`.

    Call it when the environment says what torch reads there, and nothing can be wrong with the command any more.
    """
    if not _begun or "torch" in sys.modules:
        return
    gc.disable()
    for name in EXTENSIONS:  # the C library loads one library after the other: these would wait for torch's
        with suppress(ImportError):
            importlib.import_module(name)
    threading.Thread(target=_load_libraries, daemon=True).start()
    importlib.import_module("transformers")


def imported() -> None:
    """All is imported: look for garbage from now on, but not among what was made so far."""
    if _begun and not gc.isenabled():
        gc.freeze()
        gc.enable()


def _load_libraries() -> None:
    """Load the libraries that torch is about to load, without Python's lock, which `import` and ctypes' own loading keep."""
    with suppress(Exception):  # then torch loads them, or says what is wrong
        spec = importlib.util.find_spec("torch")
        library = Path(spec.origin).parent / "lib" / "libtorch_python.so"
        load = ctypes.CDLL(None).dlopen
        load.restype, load.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
        load(os.fsencode(library), os.RTLD_NOW)


def need_meta_kernels() -> None:
    """Load torch's kernels for meta tensors, if they were put off."""
    _load(importlib.import_module(META_KERNELS))


class _Finder(MetaPathFinder):
    """Finds modules as the others do, and gives those that are put off, or changed, another loader."""

    def find_spec(self, name, path, target=None):
        if name not in MODULES and name != NAMES:
            return None
        spec = next((s for f in sys.meta_path if f is not self and (s := f.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _NamesLoader(spec.loader) if name == NAMES else _LaterLoader(spec.loader)
        return spec


class _Later(ModuleType):
    """A module that has not been executed yet."""

    def __getattribute__(self, name: str):
        own = object.__getattribute__(self, "__dict__")
        if name in own or (name.startswith("__") and name.endswith("__")):
            return object.__getattribute__(self, name)
        if (stand_in := STAND_INS.get((own.get("__name__"), name))) is not None:
            return stand_in
        _load(self)
        return getattr(self, name)


def _mark(function: Callable | None = None, *_, **__):
    return function if function is not None else _mark


# decorators that tell the compiler something about a function: as long as there is no compiler they return it
STAND_INS = {(COMPILER, name): _mark for name in ("disable", "allow_in_graph", "assume_constant_result")} | {
    ("torch._export", "wrappers"): SimpleNamespace(allow_in_pre_dispatch_graph=_mark)
}


class _OverLoader(Loader):
    """Does something to a module when it is executed. loader: what executes it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader


class _LaterLoader(_OverLoader):
    """Makes a _Later of a module."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module.__class__ = _Later


def _load(module: ModuleType) -> None:
    """Execute a module that was put off; the kernels for meta tensors first, as torch does."""
    if type(module) is not _Later:
        return
    module.__class__ = ModuleType
    if module.__name__ != META_KERNELS:
        need_meta_kernels()
    module.__spec__.loader.exec_module(module)


class _NamesLoader(_OverLoader):
    """Loads the module that lists transformers' names, with a list that is kept."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self.loader.exec_module(module)
        with suppress(AttributeError):
            module.is_torch_distributed_available = lambda: False
            module.create_import_structure_from_path = _kept(module.create_import_structure_from_path)


def _kept(list_names: Callable) -> Callable:
    """`create_import_structure_from_path` whose result for the folder of all models is kept in the cache folder."""
    known = {}

    def kept(path):
        place = Path(path)
        folder = place.parent if place.suffix == ".py" else place
        if folder.name != "models":
            return list_names(path)
        if folder not in known:
            known[folder] = _read_names(folder) or _write_names(folder, list_names(path))
        return known[folder]

    return kept


def _names_file(folder: Path) -> Path | None:
    """Where the names of an installed transformers are kept; None if it may change under the same version."""
    record = next(folder.parent.parent.glob("transformers-*.dist-info/RECORD"), None)
    if record is None:
        return None
    state = record.stat()
    return cache_folder("imports") / f"{record.parent.stem}-{state.st_size:x}-{state.st_mtime_ns:x}.json"


def _read_names(folder: Path) -> dict | None:
    try:
        file = _names_file(folder)
        return None if file is None else _unpacked(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write_names(folder: Path, names: dict) -> dict:
    with suppress(OSError, ValueError, TypeError):
        file = _names_file(folder)
        if file is not None:
            write_text_atomic(file, json.dumps(_packed(names)))
    return names


def _packed(names: dict) -> list:
    """A structure as JSON: sets of names in dicts, whose keys are folders, modules, or sets of backends."""
    return [
        [
            sorted(key) if isinstance(key, frozenset) else key,
            {"names": sorted(value)} if isinstance(value, set) else _packed(value),
        ]
        for key, value in names.items()
    ]


def _unpacked(pairs: list) -> dict:
    return {
        frozenset(key) if isinstance(key, list) else key: (
            set(value["names"]) if isinstance(value, dict) else _unpacked(value)
        )
        for key, value in pairs
    }
