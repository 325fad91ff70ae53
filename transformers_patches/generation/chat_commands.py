"""What a chat has said so far, and the commands that change, show or keep it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers_patches import cli
from transformers_patches.errors import PartInferError
from transformers_patches.files import write_text_atomic
from transformers_patches.generation.generate import Conversation, GenerationResult

HELP = """\
/help          this text
/reset         forget the history; the system prompt stays
/system TEXT   another system prompt, from the next turn on; without TEXT: show it
/stats         what the chat has taken so far
/save FILE     write the chat to a file, as JSON
/load FILE     go on with a chat from a file
/exit          leave; so do Ctrl-D, and Ctrl-C twice
A line that ends with \\ goes on in the next one; \"\"\" opens and closes a text of several lines.
Ctrl-C stops an answer and keeps what there is of it."""
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
ROLES = ("system", "user", "assistant")
LARGEST_FILE = 64 * 2**20  # bytes


@dataclass
class Chat:
    """The messages of a chat, and their key-value cache.

    system: what the model is told first.
    turns: the other messages, `role` and `content`.
    """

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    conversation: Conversation = field(default_factory=Conversation)
    results: list[GenerationResult] = field(default_factory=list)

    def asked(self, text: str) -> list[dict[str, str]]:
        """All messages, with a user's next one."""
        return [*self.messages(), {"role": "user", "content": text}]

    def messages(self) -> list[dict[str, str]]:
        start = [{"role": "system", "content": self.system}] if self.system else []
        return [*start, *self.turns]

    def answered(self, text: str, result: GenerationResult) -> None:
        """Keep a turn and its answer."""
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": result.text}]
        self.results.append(result)

    def reset(self) -> None:
        self.turns, self.conversation = [], Conversation()

    def stats(self) -> str:
        """One line: turns, tokens, speed."""
        tokens = sum(result.generated_tokens for result in self.results)
        speeds = [r.decode_tokens_per_second for r in self.results if r.decode_tokens_per_second]
        speed = f", {sum(speeds) / len(speeds):.1f} tokens/s" if speeds else ""
        held = len(self.conversation.token_ids)
        answers = "1 answer" if len(self.results) == 1 else f"{len(self.results)} answers"
        return f"{answers}, {tokens} tokens generated{speed}; {held} tokens of the chat are in memory"

    def save(self, path: str) -> str:
        write_text_atomic(path, json.dumps({"messages": self.messages()}, ensure_ascii=False, indent=1) + "\n")
        return f"{len(self.messages())} messages are in {path}"

    def load(self, path: str) -> str:
        """Take the messages of a file; PartInferError if it does not hold a chat, and nothing changes then."""
        messages = _read(path)
        begins = bool(messages) and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if begins else None
        self.turns, self.conversation = messages[begins:], Conversation()
        return f"{len(messages)} messages from {path}"

    def tell(self, system: str) -> str:
        if system:
            self.system = system
        return f"system prompt: {self.system}" if self.system else "there is no system prompt"


def _read(path: str) -> list[dict[str, str]]:
    """The messages in a file, a system prompt at most as the first, then user and assistant in turn."""
    refused = PartInferError(
        f'{path} holds no chat: expected {{"messages": [{{"role", "content"}}, …]}}, as /save writes'
    )
    if Path(path).stat().st_size > LARGEST_FILE:
        raise refused
    try:
        messages = json.loads(Path(path).read_text(encoding="utf-8"))["messages"]
        known = [{"role": one["role"], "content": one["content"]} for one in messages]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise refused from None
    roles = [one["role"] for one in known]
    turns = roles[roles[:1] == ["system"] :]
    in_turn = turns == ["user", "assistant"] * (len(turns) // 2)
    if not in_turn or not all(isinstance(one["content"], str) for one in known):
        raise refused
    return known


def run_command(chat: Chat, text: str, *, refuse_unknown: bool) -> str | None:
    """Do what a command says, and return what to show; None if the text is not a command, but a turn.

    refuse_unknown: whether a word after / that is no command is an error (somebody types) or a turn (a file).
    """
    found = COMMAND.fullmatch(text)
    if found is None:
        return None
    name, value = found[1], (found[2] or "").strip()
    simple: dict[str, Callable[[], str]] = {
        "help": lambda: HELP,
        "stats": chat.stats,
        "system": lambda: chat.tell(value),
    }
    if name in ("save", "load"):
        if not value:
            raise PartInferError(f"/{name} needs a file: /{name} FILE")
        try:
            return getattr(chat, name)(os.path.expanduser(value))
        except OSError as error:
            raise PartInferError(cli.explained(error)) from None
    if name == "system" or (name in simple and not value):
        return simple[name]()
    if name == "reset" and not value:
        chat.reset()
        return "the history is forgotten"
    if refuse_unknown and not value:
        raise PartInferError(f"/{name} is no command: /help lists them")
    return None
