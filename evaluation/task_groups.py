"""The group of tasks that an lm-eval task belongs to, which decides its neuron file."""

from __future__ import annotations

from fnmatch import fnmatch

# The original's task groups, extended by the offline tasks. Language modelling belongs to none: it uses the model's
# neuron file.
_GROUPS = {
    "QA": ("*triviaqa*", "*squad*", "*mlqa*", "*piqa*", "*truthfulqa*", "*gsm8k*"),
    "Summarize": ("*cnn_dailymail*", "*xsum*", "*samsum*"),
    "translate_de_en": ("wmt*", "*translation*"),
}


def task_type_of(task: str) -> str | None:
    """The --task_type of a task: QA, Summarize or translate_de_en; None if it belongs to no group."""
    return next((group for group, patterns in _GROUPS.items() if any(fnmatch(task, p) for p in patterns)), None)
