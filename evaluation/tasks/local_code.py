"""HumanEval (arXiv 2107.03374): from a model's answer to a program, and whether it passes the problem's tests.

lm-eval imports this file by its path.
"""

from __future__ import annotations

import re

from evaluation.programs.run import PASSED, run_program

_BLOCK = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)  # the last may lack its end
_PYTHON = ("python", "python3", "py")


def completion_passes(doc: dict, results: list[str]) -> dict[str, float]:
    """pass@1 of an answer that continues the prompt."""
    return _passes(doc, doc["prompt"] + results[0])


def chat_passes(doc: dict, results: list[str]) -> dict[str, float]:
    """pass@1 of a chat's answer: its Python block, see `chat_solution`."""
    return _passes(doc, chat_solution(doc["prompt"], doc["entry_point"], results[0]))


def chat_solution(prompt: str, entry_point: str, answer: str) -> str:
    """The program of a chat's answer.

    The answer is its first block of Python that defines the function; else its first block, else all of it. A whole
    function follows the prompt, whose imports and helpers it may use; anything else is taken as the function's body.
    """
    blocks = [code for language, code in _BLOCK.findall(answer) if language.lower() in ("", *_PYTHON)] or [answer]
    definition = re.compile(rf"^\s*def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    code = next((block for block in blocks if definition.search(block)), None)
    if code is None:
        return prompt + blocks[0]
    return f"{prompt.rstrip()}\n    pass\n\n{code}"


def _passes(doc: dict, solution: str) -> dict[str, float]:
    program = f"{solution}\n\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(run_program(program) == PASSED)}
