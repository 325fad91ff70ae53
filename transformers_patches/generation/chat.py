"""A chat: turns of a user, commands, and Ctrl-C, which stops an answer once and leaves when it comes twice."""

from __future__ import annotations

import sys
from collections.abc import Callable

from transformers_patches import cli
from transformers_patches.generation.chat_commands import Chat, run_command
from transformers_patches.generation.chat_input import Turns

EXIT = "/exit"


def take_turns(chat: Chat, answer: Callable[[str], int], *, quiet: bool) -> int:
    """Answer turns until the input ends or says /exit, and return the exit code.

    answer: answers a turn, keeps it in the chat, and returns cli.INTERRUPTED if Ctrl-C stopped it. A turn that fails is
    said to have failed, and forgotten; the exit code is 1 if it was the last. On a terminal a Ctrl-C at the prompt
    leaves (KeyboardInterrupt) if it is the second one in a row.
    """
    turns, code, stopped = Turns(), cli.DONE, False
    if turns.on_terminal and not quiet:
        print("/help lists what can be said besides a prompt; Ctrl-D leaves", file=sys.stderr)
    try:
        while True:
            try:
                text = turns.next()
                if text is None or text == EXIT:
                    return code
                said = run_command(chat, text, refuse_unknown=turns.on_terminal)
                if said is None:
                    code = answer(text)
                    stopped = code == cli.INTERRUPTED
                else:
                    stopped = False
                    print(said, file=sys.stderr)
            except KeyboardInterrupt:
                if stopped or not turns.on_terminal:
                    raise
                stopped = True
                print("\nCtrl-C again, or /exit, leaves", file=sys.stderr)
            except OSError:  # nobody can read the next answer either
                raise
            except Exception as error:
                cli.show_error(error)
                code, stopped = cli.FAILED, False
    finally:
        turns.end()
