"""A model's chat template, a program by somebody else: run in transformers' sandbox, with bounded time and memory."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from transformers_patches.errors import PartInferError

SECONDS = 10.0
CHARACTERS = 10_000_000
BYTES = 1 << 30  # of memory, on top of what the process has
_AGAIN = 1.0  # seconds until a template that has caught the first interruption is interrupted again
_one_at_a_time = threading.Lock()  # the bound on memory is the whole process's


class _TooLong(BaseException):
    """Not an Exception, which a library on the way might catch."""


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The text of a conversation, ending where the assistant's answer begins. For any thread.

    Raises PartInferError for a template that is damaged, refuses the messages, or goes beyond its bounds.
    """
    try:
        with _one_at_a_time, _limited_memory(BYTES), _limited_time(SECONDS):
            _check_powers(tokenizer)
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except _TooLong:
        raise _error(f"has not ended after {SECONDS:g} seconds") from None
    except MemoryError:
        raise _error(f"takes more than {BYTES / 2**30:g} GiB of memory") from None
    except PartInferError:
        raise
    except Exception as error:  # a template can raise whatever Python can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _error(f"fails: {reason:.300}") from error
    if len(text) > CHARACTERS:
        raise _error(f"gives more than {CHARACTERS} characters")
    return text


def _check_powers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse powers, which no conversation needs: 9 ** 9 ** 9 is a single step that nothing can interrupt."""
    template = tokenizer.get_chat_template()
    if not isinstance(template, str):
        raise _error(f"is no text, but {str(template)[:40]!r}")
    environment = _compile_jinja_template("").environment  # compiling this template would compute its constants
    if "**" in template and environment.parse(template).find(nodes.Pow):
        raise _error("computes a power (**), which could take for ever")


def _error(what: str) -> PartInferError:
    return PartInferError(f"the model's chat template {what}; --no_chat_template does without it")


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    """Raise _TooLong in the block after so many seconds, and every second from then on, whatever thread it runs in."""
    mine, ended, interrupted = ctypes.c_ulong(threading.get_ident()), threading.Event(), threading.Event()
    deciding = threading.Lock()  # no interruption comes after the end

    def watch() -> None:
        wait = seconds
        while not ended.wait(wait):
            with deciding:
                if not ended.is_set():
                    interrupted.set()
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(mine, ctypes.py_object(_TooLong))
            wait = _AGAIN

    def end() -> None:
        with deciding:
            ended.set()
            # Take back what has not come yet. Only then: until something else interrupts, CPython 3.11 looks for
            # the exception that is gone at every call, and under a profiler for ever.
            if interrupted.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(mine, None)

    threading.Thread(target=watch, name="partinfer template", daemon=True).start()
    try:
        yield
    finally:
        try:
            end()
        finally:
            end()  # once more: the first may have been interrupted itself


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
