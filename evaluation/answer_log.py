"""Answers on disk as soon as they are there, so that a run that was stopped goes on with the next question."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers_patches.errors import PartInferError
from transformers_patches.files import make_folder

GENERATED, SCORED = "generate_until", "loglikelihood"  # lm-eval's kinds of requests that are kept


class AnswerLog:
    """Generated answers and log-likelihoods of one task and one run, a JSON line each.

    Several processes may write to one file: every line is written at once.

    path: the file; it is made with the first answer
    run: what two runs must agree in to have the same answers

    Raises PartInferError if the file has answers of another run: they are never mixed.
    """

    def __init__(self, path: Path, run: dict) -> None:
        self.path = path
        self._run = _digest(run)
        self._answers: dict[str, Any] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self._end = "\n" if text and not text.endswith("\n") else ""  # of a line whose writing was interrupted
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
                key, answer, of_run = entry["key"], entry["answer"], entry["run"]
            except (ValueError, KeyError, TypeError):
                continue  # such a line
            if of_run != self._run:
                raise PartInferError(
                    f"{path} has answers of a run with other settings, which was stopped: repeat that run, or remove the file"
                )
            self._answers[key] = answer
        self.kept = len(self._answers)  # answers that a stopped run has left

    def get(self, kind: str, request: tuple) -> Any:
        """The answer to a request as lm-eval has it: a prompt and options, or a context and its continuation; None: none yet.

        Texts of generated answers, (log-likelihood, whether it is the greedy answer) of scored ones.
        """
        answer = self._answers.get(self._key(kind, request))
        return tuple(answer) if isinstance(answer, list) else answer

    def add_partial(self, kind: str, request: tuple, answer: Any) -> None:
        """Keep an answer. lm-eval calls this for each one, as it would its own cache."""
        if kind not in (GENERATED, SCORED):
            return
        key = self._key(kind, request)
        self._answers[key] = answer
        make_folder(self.path.parent)
        line = self._end + json.dumps({"run": self._run, "key": key, "answer": answer}) + "\n"
        self._end = ""
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode("ascii"))

    def forget(self) -> None:
        """Remove the file."""
        self._answers.clear()
        self.path.unlink(missing_ok=True)

    def _key(self, kind: str, request: tuple) -> str:
        return _digest([kind, *request])


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
