"""The compiled library: found or built at first use, with fake implementations of its ops for torch.compile."""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from transformers_patches.errors import PartInferError
from transformers_patches.kernels.formats import GROUP

ENVIRONMENT = "PARTINFER_KERNELS"


class Library:
    """The compiled library, loaded once.

    ops: torch.ops.partinfer, or None where PyTorch must compute instead.
    why_not: why `ops` is None.
    loaded: whether loading has been tried.
    """

    def __init__(self) -> None:
        self.ops = None
        self.why_not = ""
        self.loaded = False
        self._lock = threading.Lock()

    def get(self):
        """The ops, or None. Compiles them if they haven't been (once, with a notice)."""
        if not self.loaded:
            with self._lock:
                if not self.loaded:
                    self._load(os.environ.get(ENVIRONMENT, ""))
        return self.ops

    def _load(self, forced: str) -> None:
        if forced in ("off", "reference"):
            self.why_not = f"switched off by {ENVIRONMENT}={forced}"
        elif not sys.platform.startswith("linux"):
            self.why_not = f"the kernels are built on Linux only, this is {sys.platform}"
            _notice(f"no native kernels: {self.why_not}; PyTorch computes instead, slower")
        else:
            self._load_native(forced)
        self.loaded = True

    def _load_native(self, forced: str) -> None:
        from transformers_patches.kernels import build  # Linux only: it locks files

        try:
            own = [forced] if forced in build.isas_of(platform.machine()) else build.own_isas()
            path = build.find_library(isa_names=own)
            if path is None:
                if failure := build.find_failure():
                    raise failure
                _notice(f"compiling the CPU kernels once, one to three minutes, into {build.cache_folder()}")
                path = build.build(own, again=False)
            torch.ops.load_library(path)
        except (build.BuildError, OSError) as error:
            self.why_not = str(error)
            _notice(f"no native kernels: {error}; PyTorch computes instead, slower")
            return
        _register_fakes()
        self.ops = torch.ops.partinfer
        if forced:
            _set_variant(self.ops, forced)


LIBRARY = Library()


def available() -> bool:
    """Whether the native kernels can be used here; builds them if they aren't built yet."""
    return LIBRARY.get() is not None


def why_not() -> str:
    """Why `available()` is False, or an empty string."""
    LIBRARY.get()
    return LIBRARY.why_not


def variants() -> list[str]:
    """The kernel variants that this build and processor can run, slowest first."""
    return list(LIBRARY.get().variants()) if available() else []


def variant() -> str:
    """The variant in use, or "reference"."""
    return LIBRARY.get().variant() if available() else "reference"


@contextmanager
def use_variant(name: str) -> Iterator[None]:
    """Use another variant, one of `variants()`, inside a with block, for comparisons.

    It holds for the whole process, so no other thread may compute meanwhile. Raises PartInferError for a variant that
    this build or processor lacks.
    """
    ops = LIBRARY.get()
    before = ops.variant()
    _set_variant(ops, name)
    try:
        yield
    finally:
        ops.set_variant(before)


def _set_variant(ops, name: str) -> None:
    if name not in ops.variants():
        raise PartInferError(
            f"kernels {name!r} can't run here: expected off, reference or one of {', '.join(ops.variants())}"
        )
    ops.set_variant(name)


def _notice(text: str) -> None:
    print(f"partinfer: {text}", file=sys.stderr)


def _register_fakes() -> None:
    """Tell torch.compile the shapes and types of every op's results."""

    def fake(names: str, implementation) -> None:
        for name in names.split():
            torch.library.register_fake(f"partinfer::{name}")(implementation)

    def per_token(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[:-1].numel(), dtype=torch.int64)

    fake("quantize dequantize join_planes split_planes", lambda *_: None)
    for weights in ("", "quant_"):
        fake(f"{weights}sparse_ffn {weights}sparse_ffn_plain", lambda x, *_: torch.empty_like(x))
        fake(
            f"{weights}sparse_ffn_by_up {weights}sparse_ffn_plain_by_size",
            lambda x, *_: (torch.empty_like(x), per_token(x)),
        )
    fake("dense_ffn add_norm", lambda x, *_: torch.empty_like(x))
    fake("linear quant_linear", lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight)))
    fake("weighted_rows", lambda h, weight: h.new_empty(*h.shape[:-1], weight.shape[1]))
    fake("quant_weighted_rows", lambda h, _, scales, *__: h.new_empty(*h.shape[:-1], scales.shape[1] * GROUP))
    fake("screened_linear", lambda x, data, *_: (x.new_empty(*x.shape[:-1], data.shape[1]), per_token(x)))
    fake("attention_step", lambda x, *_: (torch.empty_like(x), torch.empty_like(x)))
    fake("core_counts", lambda h, _: h.new_empty(h.shape[1], dtype=torch.int64))
    fake("most_marked", lambda counts, _, __, wanted: counts.new_empty(wanted, dtype=torch.int32))
    fake("sum_of_squares", lambda values: values.new_empty(values.shape[1], dtype=torch.float32))
    fake("typical_scale", lambda sums, *_: torch.empty_like(sums))
