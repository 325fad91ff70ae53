"""Which group of tasks, and so which neuron file, an lm-eval task belongs to."""

from __future__ import annotations

from fnmatch import fnmatch

# Task groups of the original, with the offline tasks beside them. Language modelling belongs to none: it takes the
# model's neuron file.
_GROUPS = {
    "QA": ("*triviaqa*", "*squad*", "*mlqa*", "*piqa*", "*truthfulqa*"),
    "Summarize": ("*cnn_dailymail*", "*xsum*", "*samsum*"),
    "translate_de_en": ("wmt*", "*translation*"),
}


def task_type_of(task: str) -> str | None:
    """QA, Summarize or translate_de_en, as --task_type has them; None for tasks of no group."""
    return next((group for group, patterns in _GROUPS.items() if any(fnmatch(task, p) for p in patterns)), None)
