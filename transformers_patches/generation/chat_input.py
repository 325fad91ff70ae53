"""What the user of a chat types: lines with editing and a history on a terminal, plain lines from anything else."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO

from transformers_patches.errors import PartInferError
from transformers_patches.files import atomic_path, cache_folder

BLOCK = '"""'  # opens and closes a text of several lines
HISTORY = "history"
LINES_KEPT = 1000
PROMPT, MORE = "\nYou: ", "...  "


def standard_input() -> IO:
    """Standard input as bytes, so that one wrong byte spoils only its own line; as text if it gives no bytes."""
    if sys.stdin is None:
        raise PartInferError("standard input is closed: give the text with --prompt")
    return getattr(sys.stdin, "buffer", sys.stdin)


def decoded(content: str | bytes) -> str:
    """What was read from standard input as text; PartInferError for bytes that are not text."""
    if isinstance(content, str):
        return content
    encoding = sys.stdin.encoding if sys.stdin.encoding.lower() not in ("ascii", "ansi_x3.4-1968") else "utf-8"
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{content[error.start]:02x} at place {error.start}"
        raise PartInferError(
            f"standard input is no {encoding} text ({wrong}): convert it, for example with iconv"
        ) from None


class Turns:
    """The turns of a user, one after the other.

    On a terminal lines are edited by readline, which keeps a history in the cache folder, readable by the user alone. A
    line that ends with a backslash goes on in the next one, and three quotes open and close a text of several lines.
    """

    def __init__(self) -> None:
        self._source = standard_input()
        self.on_terminal = self._source.isatty()
        self._readline = _readline() if self.on_terminal and sys.stdout.isatty() else None

    def next(self) -> str | None:
        """The next turn that is not empty, stripped; None at the end of the input.

        PartInferError for bytes that are not text; KeyboardInterrupt for Ctrl-C.
        """
        while (line := self._line(PROMPT)) is not None:
            text = self._whole(line).strip() if self.on_terminal else line.strip()
            if text:
                return text
        return None

    def _line(self, prompt: str) -> str | None:
        """A line without its end; None at the end of the input."""
        if self._readline is not None:
            try:
                sys.stdout.write("\n" * prompt.startswith("\n"))
                return input(prompt.lstrip("\n"))
            except EOFError:
                print()
                return None
            except UnicodeDecodeError:
                raise PartInferError("that is not in the terminal's encoding: type it again") from None
        if self.on_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = self._source.readline()
        return decoded(line.rstrip(b"\r\n" if isinstance(line, bytes) else "\r\n")) if line else None

    def _whole(self, line: str) -> str:
        """A turn that begins with a line: with those that follow if it asks for them."""
        if line.strip().startswith(BLOCK):
            lines = [line.strip()[len(BLOCK) :]]
            while not lines[-1].rstrip().endswith(BLOCK) and (more := self._line(MORE)) is not None:
                lines.append(more)
            return "\n".join(lines).rstrip().removesuffix(BLOCK)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            if (more := self._line(MORE)) is None:
                break
            lines.append(more)
        return "\n".join(lines)

    def end(self) -> None:
        """Keep the history."""
        if self._readline is None:
            return
        with suppress(OSError), atomic_path(cache_folder("chat") / HISTORY) as temporary:
            os.chmod(temporary, 0o600)
            self._readline.set_history_length(LINES_KEPT)
            self._readline.write_history_file(temporary)


def _readline():
    """Python's readline with the history of earlier chats; None where Python was built without it."""
    try:
        import readline
    except ImportError:
        return None
    with suppress(OSError):
        readline.read_history_file(cache_folder("chat") / HISTORY)
    return readline
