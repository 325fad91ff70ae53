"""How every script begins and ends: threads, progress bars, exit codes, one-line errors, JSON."""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from transformers_patches.errors import PartInferError
from transformers_patches.files import write_text_atomic
from transformers_patches.flags import STANDARD_OUTPUT
from transformers_patches.hub_tokens import without_tokens

DONE, FAILED, INTERRUPTED = 0, 1, 130
BAR_DELAY = 2.0  # seconds without a progress bar
PRIMITIVES = "64"  # several times what one prompt needs


def wait_briefly() -> None:
    """Make GNU OpenMP's threads sleep soon when they wait for each other. Call it before torch is imported.

    By default they spin for milliseconds, and decoding next to another busy program falls to a hundredth of its speed
    (docs/speed.md). Does nothing if the environment already says how to wait.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def limit_primitives() -> None:
    """Bound the memory that oneDNN, PyTorch's matrix library, keeps. Call it before the first matrix product.

    It keeps code for up to 1024 shapes that it has met, here one for every length of a prompt, and some take a
    megabyte. https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)


def prepare_torch() -> None:
    """Set what the environment must say before torch is imported."""
    wait_briefly()
    limit_primitives()


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    try:  # Linux: getrusage would also count the memory of the program that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def begin(arguments: argparse.Namespace) -> None:
    """Apply --threads and --quiet. Call it before anything else imports torch or tqdm."""
    prepare_torch()
    hide_bars(arguments)
    if getattr(arguments, "threads", None):
        import torch

        torch.set_num_threads(arguments.threads)


def hide_bars(arguments: argparse.Namespace) -> None:
    """Switch off all progress bars with --quiet. Call it before tqdm is imported: that is when tqdm reads this."""
    if getattr(arguments, "quiet", False):
        os.environ["TQDM_DISABLE"] = "1"


def bar(what: str) -> Callable[[Iterable], Iterable]:
    """Iterates over things with a progress bar on standard error, if that is a terminal and it takes over two seconds."""

    def progress(items: Iterable) -> Iterable:
        from tqdm import tqdm  # reads when it is imported whether bars are switched off

        return tqdm(items, desc=what, delay=BAR_DELAY, leave=False, disable=None)

    return progress


def write_json(target: str | Path, content: dict, indent: int | None = None) -> None:
    """Print an object, or write it to a file, as --json says."""
    unicode = target != STANDARD_OUTPUT or "utf" in (sys.stdout.encoding or "utf-8").lower()
    text = json.dumps(content, indent=indent, ensure_ascii=not unicode)
    if target == STANDARD_OUTPUT:
        print(text, flush=True)
    else:
        write_text_atomic(target, text + "\n")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)


def report(target: str | None, content: dict, text: str, indent: int | None = None) -> None:
    """Report a result as --json says: as text, as an object instead, or as text with an object in a file."""
    if target != STANDARD_OUTPUT:
        print(text, flush=True)
    if target is not None:
        write_json(target, content, indent)


def guarded(main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Call a script's main and return its exit code: 0 done, 1 failed with one line on standard error, 130 interrupted.

    Wrong usage is 2: argparse exits by itself. An error that a library raises is one line as well; with --debug on the
    command line, its traceback comes first.

    interrupted: the message after Ctrl-C.
    """
    if sys.stdout is None:
        print("error: standard output is closed", file=sys.stderr)
        return FAILED
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows ? for it
        sys.stdout.reconfigure(errors="replace")
    try:
        code = main() or DONE
        sys.stdout.flush()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BaseException as error:  # failures of the tokenizers library are not Exceptions
        if not isinstance(error, BrokenPipeError):  # `| head` has seen enough
            show_error(error)
        _give_up_output()
        return FAILED
    return code


def show_error(error: BaseException) -> None:
    """One line on standard error; with --debug on the command line, after the traceback."""
    if "--debug" in sys.argv:
        print(without_tokens("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print(f"error: {explained(error)}", file=sys.stderr)


def explained(error: BaseException) -> str:
    """An error in one line: a PartInferError's own, an OSError's file and reason, else its type and message.

    Never a hub token.
    """
    said = " ".join(without_tokens(str(error)).split())
    if isinstance(error, PartInferError):
        return said
    if isinstance(error, OSError):
        reason = " ".join(str(error.strerror or error).split())
        return f"{error.filename or 'input or output'}: {reason}"
    if isinstance(error, UnicodeError):
        return f"text that can't be read or written: {said}"
    if isinstance(error, MemoryError):
        return f"not enough memory{': ' * bool(said)}{said}"
    return f"{type(error).__name__}: {said[:500]} (--debug shows where)"


def _give_up_output() -> None:
    """Drop what is left to be flushed: it would fail again when Python ends, and be reported twice."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main: Callable[[], int | None]) -> None:
    """Call a script's main, and exit with its code."""
    sys.exit(guarded(main))
