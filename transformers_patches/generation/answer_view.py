"""How an answer is shown while it comes: as it is, or on a terminal as Markdown, by the library rich if it is there."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Protocol

try:
    import termios
except ImportError:  # Windows
    termios = None

FENCE = "```"
REDRAWN_EVERY = 0.1  # seconds


class AnswerView(Protocol):
    """Shows answers, one after the other."""

    def piece(self, text: str) -> None:
        """Show more of the answer."""

    def end(self) -> None:
        """The answer is over."""

    def fail(self) -> None:
        """An error ended the answer."""


class PlainView:
    """Text as it is."""

    def piece(self, text: str) -> None:
        print(text, end="", flush=True)

    def end(self) -> None:
        print(flush=True)

    def fail(self) -> None:
        pass


class MarkdownView:
    """Markdown: the paragraph that is being written is drawn again and again, those before it stay.

    rich leaves colours out where NO_COLOR is set (https://no-color.org).
    """

    def __init__(self) -> None:
        from rich.console import Console  # optional, and nobody but a chat on a terminal pays for its import
        from rich.live import Live
        from rich.markdown import Markdown

        self._console, self._live_kind, self._markdown = Console(), Live, Markdown
        self._live, self._block, self._drawn = None, "", 0.0
        self._echo_again = _nothing

    def piece(self, text: str) -> None:
        self._block += text.replace("\x1b", "␛")  # an answer shall not command the terminal
        done = finished(self._block)
        if done:
            rest, self._block = self._block[done:], self._block[:done]
            self._end_block()
            self._console.print()
            self._block = rest
        if self._block.strip() and time.monotonic() - self._drawn > REDRAWN_EVERY:
            self._draw()

    def end(self) -> None:
        self._end_block()
        self._block = ""

    def fail(self) -> None:
        self.end()  # the terminal becomes what it was

    def _draw(self) -> None:
        if self._live is None:
            self._live = self._live_kind(console=self._console, auto_refresh=False)
            self._live.start()
            self._echo_again = without_echo()
        self._live.update(self._markdown(self._block.strip("\n"), hyperlinks=False), refresh=True)
        self._drawn = time.monotonic()

    def _end_block(self) -> None:
        if self._block.strip():
            self._draw()
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._echo_again()


def finished(text: str) -> int:
    """How many characters of a Markdown text nothing that follows can change: up to its last empty line outside code."""
    end = text.rfind("\n\n")
    while end >= 0:
        if text[:end].count(FENCE) % 2 == 0:
            return end + 2
        end = text.rfind("\n\n", 0, end)
    return 0


def _nothing() -> None:
    pass


def without_echo() -> Callable[[], None]:
    """Let the terminal not write what is typed, ^C above all: it would move what is being drawn. Returns what undoes it."""
    if termios is None or not sys.stdin.isatty():
        return _nothing
    before = termios.tcgetattr(sys.stdin)
    mode = list(before)
    mode[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)
    return lambda: termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def view_for_chat() -> AnswerView:
    """Markdown on a terminal that can draw it, if rich is installed; else plain text."""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        try:
            return MarkdownView()
        except ImportError:
            pass
    return PlainView()
