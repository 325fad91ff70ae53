"""Runs lm-eval tasks: finds them and their data, and writes one result file per task and configuration."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

import lm_eval
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager

from evaluation.answer_log import AnswerLog
from evaluation.methods import Configuration
from evaluation.models import model_label, rankings_of
from evaluation.partinfer_lm import PartInferLM
from evaluation.processes import Processes, merged_counts
from evaluation.results import is_finished, result_path, write_result
from evaluation.task_groups import task_type_of
from evaluation.weights import weight_counts
from transformers_patches.errors import PartInferError

TASKS = Path(__file__).resolve().parent / "tasks"
DATA_DIR_VARIABLE = "PARTINFER_DATA_DIR"
# Two runs are the same if these agree, and the model's settings.
_RUN_OPTIONS = (
    "num_fewshot",
    "limit",
    "shuffle",
    "seed",
    "random_neurons_filepath",
    "max_length",
    "prefill_tokens",
    "scored_tokens",
    "gen_kwargs",
    "apply_chat_template",
    "system_instruction",
)


class TaskRunner:
    """Runs the requested tasks on one checkpoint. Raises PartInferError for tasks that do not exist."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, processes: Processes) -> None:
        self.folder, self.arguments, self.processes = folder, arguments, processes
        self.model = model_label(folder)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        names = [name.strip() for name in arguments.task_name.split(",") if name.strip()]
        self.manager, self.tasks = _find_tasks(names, arguments.include_path)
        data_dir = arguments.data_dir or os.environ.get(DATA_DIR_VARIABLE) or "."
        self.data_dir = Path(data_dir).resolve()
        if not self.data_dir.is_dir():
            raise PartInferError(f"no folder {data_dir}: --data_dir is where local tasks find their files")

    def tasks_by_type(self) -> dict[str | None, list[str]]:
        """The tasks grouped by their neuron file. Each group needs one model."""
        groups: dict[str | None, list[str]] = {}
        for task in self.tasks:
            groups.setdefault(self.arguments.task_type or task_type_of(task), []).append(task)
        return groups

    def run(self, configuration: Configuration, task_type: str | None, tasks: list[str]) -> list[dict]:
        """Load the model once, run tasks on it, write their result files, and return a row per metric.

        Of several processes, which share the examples, the first one has the rows and writes the files.
        """
        model = None
        rows = []
        for task in tasks:
            path = result_path(self.arguments.output_path, self.model, configuration.folder_name, task)
            run = self._run_settings(configuration, task_type)
            if self.arguments.skip_finished and is_finished(path, run):
                self._say(f"{task}, {configuration.label}: finished, see {path}")
                continue
            self._say(f"{task}, {configuration.label}")
            objects, leaves = self._load_task(task)
            self._check_allowed(leaves)
            model = model or self._load(configuration, task_type)
            model.answer_log = self._answer_log(path, run)
            result, samples = self._run_task(model, configuration, objects, leaves)
            if not self.processes.first:
                continue
            result |= {"task": task, "run": run, "answers_kept": model.answer_log.kept}
            write_result(path, result, samples)
            model.answer_log.forget()  # the result holds what counts
            shared = {
                "configuration": configuration.label,
                "ffn_bytes_fraction": result["weights"]["ffn_bytes_fraction"],
            }
            rows += [shared | metric for metric in result["metrics"]]
        return rows

    def _answer_log(self, path: Path, run: dict) -> AnswerLog:
        """Where answers are kept until the result is written: those of a run that was stopped with --skip_finished."""
        path = path.with_suffix(".answers.jsonl")
        if self.processes.first and not self.arguments.skip_finished:
            path.unlink(missing_ok=True)
        self.processes.gathered(None)  # nobody reads or writes before that
        log = AnswerLog(path, run)
        self.processes.gathered(None)  # nobody writes before all have read
        return log

    def _check_allowed(self, tasks: dict[str, Task]) -> None:
        """Raise PartInferError for tasks that run programs or hold conversations, if no flag asks for that."""
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False) and not self.arguments.run_generated_code:
                raise PartInferError(
                    f"{name} runs programs that the model writes, each in a process of its own with limits: allow it "
                    "with --run_generated_code"
                )
            if (task.config.metadata or {}).get("chat") and not self.arguments.apply_chat_template:
                raise PartInferError(f"{name} asks in a conversation: give --apply_chat_template")

    def _say(self, line: str) -> None:
        if not self.arguments.quiet:
            print(line, file=sys.stderr)

    def _run_settings(self, configuration: Configuration, task_type: str | None) -> dict:
        options = {name: getattr(self.arguments, name) for name in _RUN_OPTIONS}
        settings = configuration.settings.to_dict()
        shared = {"method": configuration.method, "task_type": task_type, "settings": settings, **options}
        return shared if configuration.published is None else shared | {"published": asdict(configuration.published)}

    def _load(self, configuration: Configuration, task_type: str | None) -> PartInferLM:
        settings, given = configuration.settings, self.arguments
        return PartInferLM(
            str(self.folder),
            rankings=rankings_of(configuration, self.folder, task_type, given),
            prefill_tokens=given.prefill_tokens,
            scored_tokens=given.scored_tokens,
            batch_size=given.batch_size,
            max_batch_size=given.max_batch_size,
            max_length=given.max_length,
            published=configuration.published,
            calibration_seed=given.seed,
            **settings.to_dict(),
        )

    def _run_task(
        self, model: PartInferLM, configuration: Configuration, objects: list, leaves: dict[str, Task]
    ) -> tuple[dict, dict[str, list]]:
        """The result of a task or group, and with --log_samples every answer by task."""
        given = self.arguments
        model.loaded.reset_counters()
        sampled = given.shuffle and given.limit is not None
        started = time.perf_counter()
        output = lm_eval.simple_evaluate(
            model=model,
            tasks=objects,
            task_manager=self.manager,
            num_fewshot=given.num_fewshot,
            limit=None if sampled else given.limit,
            samples={name: self._sample(leaf) for name, leaf in leaves.items()} if sampled else None,
            batch_size=given.batch_size,
            bootstrap_iters=given.bootstrap_iters,
            log_samples=given.log_samples,
            gen_kwargs=given.gen_kwargs,
            apply_chat_template=given.apply_chat_template,
            system_instruction=given.system_instruction,
            random_seed=given.seed,
            numpy_random_seed=given.seed,
            torch_random_seed=given.seed,
            fewshot_random_seed=given.seed,
            confirm_run_unsafe_code=given.run_generated_code,
        )
        counts = merged_counts(self.processes.gathered(weight_counts(model.loaded)))
        if output is None:  # not the first process
            return {}, {}
        samples = output.pop("samples", {})
        result = {
            "model": self.model,
            "configuration": configuration.label,
            "method": configuration.method,
            "metrics": _metrics(output["results"]),
            "rows": {name: count["effective"] for name, count in output["n-samples"].items()},
            "weights": counts,
            "seconds": round(time.perf_counter() - started, 1),
            "lm_eval": {name: output[name] for name in ("results", "versions", "n-shot", "higher_is_better")},
        }
        return result, samples

    def _sample(self, task: Task) -> list[int]:
        """--limit rows of a task, drawn with --seed, since neighbouring rows are often about one subject."""
        count = len(task.eval_docs)
        wanted = min(count, get_sample_size(task, self.arguments.limit))
        return sorted(random.Random(self.arguments.seed).sample(range(count), wanted))

    def _load_task(self, task: str) -> tuple[list, dict[str, Task]]:
        """The task or group as lm-eval's objects, and the tasks in it by name."""
        try:
            # lm-eval looks for relative data files in the current folder
            with contextlib.chdir(self.data_dir):
                found = self.manager.load([task])
        except (OSError, ValueError) as error:  # what datasets raises for missing files, and without a hub
            raise PartInferError(
                f"the data of {task} can't be read: {' '.join(str(error).split())}; local tasks read files below "
                f"--data_dir (now {self.data_dir}), the others need the hub"
            ) from None
        groups = found.get("groups", {})
        leaves = found["tasks"]
        return [groups[task]] if task in groups else list(leaves.values()), leaves


def _find_tasks(names: list[str], include_path: str | None) -> tuple[TaskManager, list[str]]:
    """The tasks that names and patterns match. The thousands of lm-eval's own are indexed only if needed."""
    # absolute paths: lm-eval reads a task's file again later, from the folder of the data
    folders = [str(TASKS), *([str(Path(include_path).resolve())] if include_path else [])]
    if include_path and not Path(include_path).is_dir():
        raise PartInferError(f"no folder {include_path}: --include_path is where own task YAMLs are")
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folders)
    missing = [name for name in names if not manager.match_tasks([name])]
    if missing or not names:
        local = [name for name in manager.all_tasks if name.startswith("local_")]
        raise PartInferError(
            f"unknown task {', '.join(missing)}: expected names of lm-eval (lm_eval ls tasks) or of "
            f"{TASKS.parent.name}/tasks ({', '.join(local)})"
        )
    return manager, [task for name in names for task in sorted(manager.match_tasks([name]))]


def _metrics(results: dict[str, dict]) -> list[dict]:
    """The `metric,filter` entries of lm-eval's results as rows."""
    rows = []
    for task, entries in results.items():
        for key, value in entries.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = entries.get(f"{metric}_stderr,{filtered}")
            stderr = stderr if isinstance(stderr, (int, float)) else None
            rows.append({"task": task, "metric": metric, "filter": filtered, "value": float(value), "stderr": stderr})
    return rows
