"""The one error that a user can cause and repair."""

from __future__ import annotations


class PartInferError(ValueError):
    """Bad input, in one line: what was given, what is expected, what to do. Scripts print it and exit with 1."""
