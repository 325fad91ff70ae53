"""The results folder: results/<model>/<configuration>/<task>.json, each written when its run has finished."""

from __future__ import annotations

import json
from pathlib import Path

from transformers_patches.errors import PartInferError
from transformers_patches.files import write_text_atomic
from transformers_patches.locks import exclusive

FORMAT = "partinfer-task-result"


def result_path(folder: str | Path, model: str, configuration: str, task: str) -> Path:
    """The path of a run's result. Slashes in a task's name do not make folders."""
    return Path(folder) / model / configuration / f"{task.replace('/', '__')}.json"


def write_result(path: Path, result: dict, samples: dict[str, list] | None = None) -> None:
    """Write a run's result, and its answers as JSON lines beside it, by the name of their task.

    Of two runs with the same path, the files are those of the one that finishes last: never a mixture of both.
    """
    with exclusive(path, wait=True):
        for name, answers in (samples or {}).items():
            lines = [json.dumps(answer, ensure_ascii=False, default=str) for answer in answers]
            write_text_atomic(path.with_name(f"{name}.samples.jsonl"), "\n".join(lines) + "\n")
        write_text_atomic(path, json.dumps({"format": FORMAT, **result}, indent=1, default=str) + "\n")


def is_finished(path: Path, run: dict) -> bool:
    """Whether there is a result of exactly this run: the same settings, limit, seed and so on. A damaged one is none."""
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("run") == json.loads(json.dumps(run, default=str))


def read_results(folder: str | Path) -> list[dict]:
    """Every task result below a folder, sorted by path. Raises PartInferError for damaged files."""
    return [content for content in _read_all(folder) if content.get("format") == FORMAT]


def read_perplexities(folder: str | Path) -> list[dict]:
    """Every result of evaluate_perplexity.py below a folder."""
    return [content for content in _read_all(folder) if "rows" in content and "format" not in content]


def _read_all(folder: str | Path) -> list[dict]:
    contents = []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise PartInferError(f"{path} is not valid JSON: {error}; remove it and run the task again") from None
        if isinstance(content, dict):
            contents.append(content)
    return contents
