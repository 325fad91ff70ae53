"""The compiled ops: found or built at first use, with their fake implementations for torch.compile."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from transformers_patches.errors import PartInferError
from transformers_patches.kernels.formats import GROUP

ENVIRONMENT = "PARTINFER_KERNELS"


class Library:
    """Loads the ops once. `ops` is torch.ops.partinfer, or None where PyTorch has to do the work (`why_not` says why)."""

    def __init__(self) -> None:
        self.ops = None
        self.why_not = ""
        self.loaded = False
        self._lock = threading.Lock()

    def get(self):
        """The ops, or None; compiles them if need be (once, with a notice)."""
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
            path = build.find_library()
            if path is None:
                _notice(f"compiling the CPU kernels once, about a minute, into {build.cache_folder()}")
                path = build.build()
            if not hasattr(torch.ops.partinfer, "sparse_ffn"):  # a build in this process has loaded it already
                torch.ops.load_library(path)
        except (build.BuildError, OSError) as error:
            self.why_not = str(error)
            _notice(f"no native kernels: {error}; PyTorch computes instead, slower")
            return
        _register_fakes()
        self.ops = torch.ops.partinfer
        if forced:
            use_variant(self.ops, forced)


def use_variant(ops, name: str) -> None:
    """Switch to a variant by name. Raises PartInferError if this build or processor lacks it."""
    if name not in ops.variants():
        raise PartInferError(
            f"kernels {name!r} can't run here: expected off, reference or one of {', '.join(ops.variants())}"
        )
    ops.set_variant(name)


@contextmanager
def variant(library: Library, name: str) -> Iterator[None]:
    """Another variant for a while, for comparisons; for the whole process, so not while others compute."""
    ops = library.get()
    before = ops.variant()
    use_variant(ops, name)
    try:
        yield
    finally:
        ops.set_variant(before)


def _notice(text: str) -> None:
    print(f"partinfer: {text}", file=sys.stderr)


def _register_fakes() -> None:
    for name in ("sparse_ffn", "sparse_ffn_plain", "quant_sparse_ffn", "quant_sparse_ffn_plain"):
        torch.library.register_fake(f"partinfer::{name}")(lambda x, *_: torch.empty_like(x))
    for name in ("sparse_ffn_out", "quantize", "dequantize"):
        torch.library.register_fake(f"partinfer::{name}")(lambda *_: None)
    for name in ("linear", "quant_linear"):
        torch.library.register_fake(f"partinfer::{name}")(lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight)))
    torch.library.register_fake("partinfer::weighted_rows")(
        lambda h, weight: h.new_empty(*h.shape[:-1], weight.shape[1])
    )
    torch.library.register_fake("partinfer::quant_weighted_rows")(
        lambda h, weight, scales, *_: h.new_empty(*h.shape[:-1], scales.shape[1] * GROUP)
    )
    for name in ("join_planes", "split_planes"):
        torch.library.register_fake(f"partinfer::{name}")(lambda *_: None)
    torch.library.register_fake("partinfer::screened_linear")(
        lambda x, data, *_: (
            x.new_empty(*x.shape[:-1], data.shape[1]),
            x.new_empty(x.shape[:-1].numel(), dtype=torch.int64),
        )
    )
    torch.library.register_fake("partinfer::core_counts")(lambda h, _: h.new_empty(h.shape[1], dtype=torch.int64))
    torch.library.register_fake("partinfer::most_marked")(
        lambda counts, _priority, _first, wanted: counts.new_empty(wanted, dtype=torch.int32)
    )
    torch.library.register_fake("partinfer::sum_of_squares")(
        lambda values: values.new_empty(values.shape[1], dtype=torch.float32)
    )
    torch.library.register_fake("partinfer::typical_scale")(lambda sums, *_: torch.empty_like(sums))
    for name in ("dense_ffn", "add_norm"):
        torch.library.register_fake(f"partinfer::{name}")(lambda x, *_: torch.empty_like(x))
    torch.library.register_fake("partinfer::attention_step")(lambda x, *_: (torch.empty_like(x), torch.empty_like(x)))
    by_token = ("sparse_ffn_by_up", "sparse_ffn_plain_by_size")
    for name in (*by_token, *(f"quant_{name}" for name in by_token)):
        torch.library.register_fake(f"partinfer::{name}")(
            lambda x, *_: (torch.empty_like(x), x.new_empty(x.shape[:-1].numel(), dtype=torch.int64))
        )
