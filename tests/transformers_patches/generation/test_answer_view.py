"""How answers are shown on a terminal."""

import io
import os
import sys

import pytest

from transformers_patches.generation.answer_view import MarkdownView, finished

pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")
pytest.importorskip("rich")


@pytest.fixture
def keyboard(monkeypatch):
    """Standard input is a terminal; its file descriptor."""
    ours, theirs = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(theirs, "r"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    yield theirs
    sys.stdin.close()
    os.close(ours)


def echoes(terminal: int) -> bool:
    return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)


@pytest.mark.parametrize("ended", ["end", "fail"])
def test_what_is_typed_is_not_written_into_a_text_that_is_being_drawn(keyboard, ended):
    assert echoes(keyboard)
    view = MarkdownView()
    view.piece("A paragraph")
    assert not echoes(keyboard)
    getattr(view, ended)()
    assert echoes(keyboard)


def test_without_a_terminal_there_is_nothing_to_turn_off(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    view = MarkdownView()
    view.piece("A paragraph")
    view.end()
    assert "A paragraph" in sys.stdout.getvalue()


def test_only_paragraphs_that_nothing_can_change_stay():
    assert finished("one\n\ntwo") == len("one\n\n")
    assert finished("```\none\n\ntwo") == 0
