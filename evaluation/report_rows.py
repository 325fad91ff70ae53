"""Turns task results and perplexities into rows: one score per task and configuration, relative to dense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.methods import METHODS
from evaluation.published.settings import NAMES as PUBLISHED
from evaluation.results import read_perplexities, read_results
from evaluation.tables import number
from transformers_patches.errors import PartInferError

# A task's score is the first of these metrics that it has.
_PRIMARY = (
    *("HasAns_f1", "f1", "exact_match", "pass@1", "prompt_level_strict_acc"),
    *("bleu", "rougeL", "rouge1", "rougeL_max", "acc", "word_perplexity"),
)
_SETTINGS = ("sparsity", "loaded_neurons_percent")
_SIZES = {"loaded_bytes_fraction": "weight_bytes_resident", "token_bytes_fraction": "token_bytes"}
# A result is compared with the dense result for the same model, task and options.
_SAME = (
    *("limit", "shuffle", "num_fewshot", "seed", "apply_chat_template", "system_instruction", "gen_kwargs"),
    *("max_length", "prefill_tokens", "scored_tokens"),
)

TASK_COLUMNS = (
    *("model", "task", "metric", "configuration", "method", *_SETTINGS),
    *("score", "stderr", "relative", "samples", "ffn_bytes_fraction", *_SIZES, "seconds"),
)
PERPLEXITY_COLUMNS = (
    *("model", "dataset", "configuration", "method", *_SETTINGS, "nll", "perplexity", "excess_nll"),
    *("kl_to_dense", "top1_agreement", "samples", "ffn_bytes_fraction", *_SIZES),
)


def task_rows(folder: str | Path, metrics: Sequence[str] = ()) -> list[dict]:
    """A row per model, task and configuration with the columns TASK_COLUMNS, methods in the order of METHODS.

    `relative` is the score divided by the dense score, or the inverse where lower is better. loaded_bytes_fraction and
    token_bytes_fraction are the weight bytes in memory, and those read for one token, divided by the dense model's.
    They are None if there is no dense result of the same sample, or if its score is 0.

    metrics: preferred to the usual ones where a task has them
    """
    results = sorted(
        read_results(folder), key=lambda result: (result["model"], result["task"], _place(result["method"]))
    )
    dense = {_same(result): result for result in results if result["configuration"] == "dense"}
    return [_task_row(result, dense.get(_same(result)), metrics) for result in results]


def _place(method: str) -> int:
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def _same(result: dict) -> tuple:
    return (result["model"], result["task"], *(str(result["run"][name]) for name in _SAME))


def _task_row(result: dict, dense: dict | None, metrics: Sequence[str]) -> dict:
    metric = primary_metric(result, metrics)
    settings, method = result["run"]["settings"], result["method"]
    row = {
        "model": result["model"],
        "task": result["task"],
        "metric": metric["metric"],
        "configuration": result["configuration"],
        "method": method,
        **_settings_of(method, settings["sparsity"], settings["loaded_neurons_percent"]),
        "score": metric["value"],
        "stderr": metric["stderr"],
        "relative": None,
        "samples": sum(result["rows"].values()),
        "ffn_bytes_fraction": result["weights"]["ffn_bytes_fraction"] if _decoded(result) else None,
        "seconds": result["seconds"],
    }
    same = dense and next((other for other in dense["metrics"] if other["metric"] == metric["metric"]), None)
    if same:
        expected = same["value"]
        lower_is_better = metric["metric"].endswith("perplexity")
        ratio = (expected, metric["value"]) if lower_is_better else (metric["value"], expected)
        row["relative"] = ratio[0] / ratio[1] if ratio[1] else None
    sizes = _size_fractions(result["weights"], dense and dense["weights"])
    return row | (sizes if _decoded(result) else sizes | {"token_bytes_fraction": None})


def _decoded(result: dict) -> bool:
    """Whether a run decoded anything, so that neurons were counted. Every answer may end with its first token."""
    return result["method"] == "dense" or result["weights"]["decoded_tokens"] > 0


def primary_metric(result: dict, preferred: Sequence[str] = ()) -> dict:
    """The metric row that gives a task's score; PartInferError if it has no known or preferred metric."""
    for name in (*preferred, *_PRIMARY):
        for metric in result["metrics"]:
            if metric["metric"] == name:
                return metric
    known = ", ".join(sorted({metric["metric"] for metric in result["metrics"]}))
    raise PartInferError(
        f"{result['task']} has the metrics {known or '(none)'}; the report knows {', '.join(_PRIMARY)}: "
        "name one with --metric"
    )


def perplexity_rows(folder: str | Path) -> list[dict]:
    """A row per configuration of each result of evaluate_perplexity.py, with the columns PERPLEXITY_COLUMNS.

    The name of a configuration that was scored token by token says so.
    """
    rows = []
    for result in read_perplexities(folder):
        dense = next((row for row in result["rows"] if row["label"] == "dense"), None)
        scoring = " token by token" if result.get("scoring") == "token_by_token" else ""
        for row in result["rows"]:
            names = {"model": result["model"], "dataset": Path(result["dataset"]).name}
            names["configuration"] = row["label"] + scoring
            measured = {name: row.get(name) for name in (*PERPLEXITY_COLUMNS, *(f"{n}_ci" for n in PERPLEXITY_COLUMNS))}
            rows.append(measured | names | {"samples": row["examples"]} | _size_fractions(row, dense))
    return rows


def _settings_of(method: str, sparsity: float, loaded: float) -> dict:
    """The fractions that a method uses."""
    whole = method.startswith("dense") or method in PUBLISHED
    partial = method not in ("dense", "coreinfer", *PUBLISHED)
    return {
        "sparsity": None if whole else sparsity,
        "loaded_neurons_percent": loaded if partial else 1.0,
    }


def _size_fractions(weights: dict, dense: dict | None) -> dict:
    return {name: weights[size] / dense[size] if dense else None for name, size in _SIZES.items()}


def by_configuration(rows: list[dict]) -> list[dict]:
    """A row per task, metric and sample size, with a column `score ± standard error` for each configuration."""
    table: dict[tuple, dict] = {}
    for row in rows:
        names = {name: row[name] for name in ("task", "metric", "samples")}
        error = "" if row["stderr"] is None else f" ± {number(row['stderr'])}"
        table.setdefault(tuple(names.values()), names)[row["configuration"]] = f"{number(row['score'])}{error}"
    return list(table.values())


def mean_relative(rows: list[dict]) -> list[dict]:
    """For each model and configuration, the mean of `relative` and of the sizes over the tasks that have them."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["relative"] is not None:
            groups.setdefault((row["model"], row["configuration"]), []).append(row)
    means = []
    for (model, configuration), members in groups.items():
        numbers = ("relative", "ffn_bytes_fraction", *_SIZES)
        mean = {name: _mean([member[name] for member in members]) for name in numbers}
        means.append({"model": model, "configuration": configuration, "method": members[0]["method"], **mean})
        means[-1]["tasks"] = len(members)
    return means


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
