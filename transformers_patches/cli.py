"""How every script begins and ends: threads, progress bars, exit codes, one-line errors, JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from transformers_patches.errors import PartInferError
from transformers_patches.files import write_text_atomic
from transformers_patches.flags import STANDARD_OUTPUT

DONE, FAILED, INTERRUPTED = 0, 1, 130


def wait_briefly() -> None:
    """Let OpenMP's threads (GNU) sleep soon where they wait for each other; only before torch is imported.

    By default they spin for milliseconds, so that beside another busy program decoding falls to a hundredth of its speed
    (docs/speed.md). Does nothing where the environment says how to wait.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def begin(arguments: argparse.Namespace) -> None:
    """What --threads and --quiet mean everywhere; before anything else imports torch or tqdm."""
    wait_briefly()
    hide_bars(arguments)
    if getattr(arguments, "threads", None):
        import torch

        torch.set_num_threads(arguments.threads)


def hide_bars(arguments: argparse.Namespace) -> None:
    """No progress bars with --quiet, libraries' included; before tqdm is imported, which is when it reads this."""
    if getattr(arguments, "quiet", False):
        os.environ["TQDM_DISABLE"] = "1"


def write_json(target: str | Path, content: dict, indent: int | None = None) -> None:
    """Print an object, or write it to a file, as --json says."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    if target == STANDARD_OUTPUT:
        print(text, flush=True)
    else:
        write_text_atomic(target, text + "\n")


def report(target: str | None, content: dict, text: str, indent: int | None = None) -> None:
    """Give a result as --json says: as text, as an object instead, or as text and an object in a file."""
    if target != STANDARD_OUTPUT:
        print(text, flush=True)
    if target is not None:
        write_json(target, content, indent)


def guarded(main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Call a script's main and return its exit code: 0 done, 1 failed with one line on standard error, 130 interrupted.

    interrupted: what is said then. (Wrong usage is 2: argparse exits by itself.)
    """
    try:
        code = main() or DONE
        sys.stdout.flush()
    except PartInferError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # `| head` has seen enough
        with suppress(OSError, ValueError):  # what is left to be flushed would fail again, and be reported
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:  # no permission, a full disk, …
        reason = " ".join(str(error.strerror or error).split())
        print(f"error: {error.filename or 'input or output'}: {reason}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    return code


def run(main: Callable[[], int | None]) -> None:
    """Call a script's main, and exit with its code."""
    sys.exit(guarded(main))
