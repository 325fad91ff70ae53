"""Answers on disk as soon as they are there, so that a run that was stopped goes on with the next question."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers_patches.files import make_folder


class AnswerLog:
    """Generated answers of one task and one run, a JSON line each; answers of other runs in the file are ignored.

    path: the file; it is made with the first answer
    run: what two runs must agree in to have the same answers
    """

    def __init__(self, path: Path, run: dict) -> None:
        self.path = path
        self._run = json.dumps(run, sort_keys=True, default=str)
        self._answers: dict[str, str] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                    self._answers[entry["key"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue  # the last line, if writing it was interrupted

    def get(self, request: tuple[str, dict]) -> str | None:
        """The answer to a prompt with its generation options; None if there is none yet."""
        return self._answers.get(self._key(request))

    def add_partial(self, kind: str, request: tuple[str, dict], answer: Any) -> None:
        """Keep an answer. lm-eval calls this for each one, as it would its own cache."""
        if kind != "generate_until":
            return
        key = self._key(request)
        self._answers[key] = answer
        make_folder(self.path.parent)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")

    def forget(self) -> None:
        """Remove the file."""
        self._answers.clear()
        self.path.unlink(missing_ok=True)

    def _key(self, request: tuple[str, dict]) -> str:
        prompt, options = request
        text = json.dumps([self._run, prompt, options], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()
