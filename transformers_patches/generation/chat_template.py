"""A model's chat template, a program by somebody else: run in transformers' sandbox, with bounded time and memory."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from transformers_patches.errors import PartInferError

SECONDS = 10.0
CHARACTERS = 10_000_000
BYTES = 1 << 30  # of memory, on top of what the process has


class _TooLong(BaseException):
    """Not an Exception, which a library on the way might catch."""


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The text of a conversation, ending where the assistant's answer begins.

    Raises PartInferError for a template that is damaged, refuses the messages, or goes beyond its bounds. The bound on
    time holds only in a program's main thread, where Python handles signals.
    """
    try:
        with _limited_memory(BYTES), _limited_time(SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except _TooLong:
        raise _error(f"has not ended after {SECONDS:g} seconds") from None
    except MemoryError:
        raise _error(f"takes more than {BYTES / 2**30:g} GiB of memory") from None
    except Exception as error:  # a template can raise whatever Python can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _error(f"fails: {reason:.300}") from error
    if len(text) > CHARACTERS:
        raise _error(f"gives more than {CHARACTERS} characters")
    return text


def _error(what: str) -> PartInferError:
    return PartInferError(f"the model's chat template {what}; --no_chat_template does without it")


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    """Raise _TooLong in the block after so many seconds, and every second from then on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal, _frame) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _limited_memory(more: int) -> Iterator[None]:
    """MemoryError in the block for more than so many bytes; on Linux, where the memory in use is known."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + more
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
