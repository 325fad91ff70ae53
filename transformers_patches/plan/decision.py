"""What was decided about one setting, and why."""

from __future__ import annotations

from dataclasses import dataclass

GIVEN = "as given"


@dataclass(frozen=True)
class Decision:
    """The value of a setting."""

    value: str  # as the setting's flag takes it
    why: str  # the reason, in a few words
