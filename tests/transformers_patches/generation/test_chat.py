"""A chat: what is typed on a terminal, commands, Ctrl-C, and how answers are drawn."""

import io
import json
import os
import pty
import re
import sys

import pytest

from transformers_patches import cli
from transformers_patches.errors import PartInferError
from transformers_patches.generation import answer_view, chat, chat_input
from transformers_patches.generation.chat_commands import Chat, run_command
from transformers_patches.generation.generate import GenerationResult

ANSWER = GenerationResult(
    text="Hello.", token_ids=[5, 6], prompt_tokens=3, prefilled_tokens=3, finish_reason="stop",
    time_to_first_token_s=0.1, decode_tokens_per_second=20.0,
)  # fmt: skip


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    """Types on a pseudo-terminal that is standard input; standard output is none, so lines come without readline."""
    monkeypatch.setenv("PARTINFER_CACHE", str(tmp_path))
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield lambda text: os.write(ours, text.encode())
        os.close(ours)


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("one line\n", "one line"),
        ("\n  \nafter empty ones\n", "after empty ones"),
        ("goes on\\\nhere\n", "goes on\nhere"),
        ('"""first\n\nthird"""\n', "first\n\nthird"),
        ('"""\nin between\n"""\n', "in between"),
        ('"""whole"""\n', "whole"),
    ],
)
def test_turns_on_a_terminal(terminal, typed, expected):
    terminal(typed)
    assert chat_input.Turns().next() == expected


def test_lines_of_a_pipe_are_turns_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'ends with \\\n"""quoted\n')))
    turns = chat_input.Turns()
    assert [turns.next() for _ in range(3)] == ["ends with \\", '"""quoted', None]


def _ended_chat(monkeypatch, steps: list, *, on_terminal: bool = True) -> int:
    """The exit code of a chat whose turns are texts, or exceptions."""

    class Typed:
        def __init__(self):
            self.on_terminal, self._steps = on_terminal, iter([*steps, None])

        def next(self):
            step = next(self._steps)
            if isinstance(step, BaseException):
                raise step
            return step

        def end(self):
            pass

    monkeypatch.setattr(chat, "Turns", Typed)
    codes = {"stopped": cli.INTERRUPTED, "fails": None}

    def answer(text):
        if text == "fails":
            raise PartInferError("too long")
        return codes.get(text, cli.DONE)

    return chat.take_turns(Chat(), answer, quiet=True)


def test_control_c_at_the_prompt_leaves_when_it_comes_twice(monkeypatch, capsys):
    once = KeyboardInterrupt()
    assert _ended_chat(monkeypatch, [once, "again"]) == cli.DONE
    assert "Ctrl-C again" in capsys.readouterr().err
    assert _ended_chat(monkeypatch, [once, "a turn between", once]) == cli.DONE
    for twice in ([once, once], ["stopped", once]):
        with pytest.raises(KeyboardInterrupt):
            _ended_chat(monkeypatch, twice)
    with pytest.raises(KeyboardInterrupt):
        _ended_chat(monkeypatch, [once], on_terminal=False)


def test_the_exit_code_is_that_of_the_last_turn(monkeypatch):
    assert _ended_chat(monkeypatch, ["fails"]) == cli.FAILED
    assert _ended_chat(monkeypatch, ["fails", "works", "/exit", "fails"]) == cli.DONE


def test_commands_change_what_the_model_is_told(tmp_path):
    talk = Chat("Be brief.")
    talk.answered("Hi", ANSWER)
    assert [one["role"] for one in talk.asked("More")] == ["system", "user", "assistant", "user"]
    assert "1 answer, 2 tokens generated, 20.0 tokens/s" in run_command(talk, "/stats", refuse_unknown=True)
    file = tmp_path / "talk.json"
    run_command(talk, f"/save {file}", refuse_unknown=True)
    run_command(talk, "/system Be\nlong.", refuse_unknown=True)
    run_command(talk, "/reset", refuse_unknown=True)
    assert talk.messages() == [{"role": "system", "content": "Be\nlong."}]
    run_command(talk, f"/load {file}", refuse_unknown=True)
    assert talk.system == "Be brief."
    assert talk.turns == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def test_what_is_no_command(tmp_path):
    for text in ("/etc/hosts holds names", "no /help here", "/Help"):
        assert run_command(Chat(), text, refuse_unknown=True) is None
    assert run_command(Chat(), "/unknown", refuse_unknown=False) is None
    with pytest.raises(PartInferError, match="/unknown is no command"):
        run_command(Chat(), "/unknown", refuse_unknown=True)
    with pytest.raises(PartInferError, match="needs a file"):
        run_command(Chat(), "/save", refuse_unknown=True)
    with pytest.raises(PartInferError, match="No such file"):
        run_command(Chat(), f"/load {tmp_path}/none.json", refuse_unknown=True)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"messages": 3}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "tool", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": "no answer"}]}',
        json.dumps({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}]}),
    ],
)
def test_files_that_hold_no_chat_change_nothing(tmp_path, content):
    file = tmp_path / "chat.json"
    file.write_text(content)
    talk = Chat("Be brief.")
    talk.answered("Hi", ANSWER)
    with pytest.raises(PartInferError, match="holds no chat"):
        run_command(talk, f"/load {file}", refuse_unknown=True)
    assert len(talk.messages()) == 3


@pytest.mark.parametrize(
    "text, done",
    [("one", 0), ("one\n\ntwo", 5), ("one\n\ntwo\n\nthree", 10), ("```\na\n\nb", 0), ("x\n\n```\na\n\nb", 3)],
)
def test_finished_paragraphs(text, done):
    assert answer_view.finished(text) == done


def test_markdown_is_drawn_whole_and_commands_nothing(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    view = answer_view.MarkdownView()
    for piece in ("A **bold** ", "word.\n", "\n- item\n\x1b[31m", "\n\n```\ncode\n"):
        view.piece(piece)
    view.end()
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()]
    assert "A bold word." in lines
    assert any("item" in line for line in lines)
    assert "code" in lines
    assert "\x1b[31m" not in screen.getvalue()
