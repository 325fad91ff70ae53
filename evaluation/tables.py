"""Result rows as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence


def markdown_table(rows: Sequence[dict], columns: Sequence[str]) -> str:
    """A Markdown table. Numbers have three decimals, and `<name>_ci`, if present, follows in brackets."""
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join('---' for _ in columns)}|"]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row, column) for column in columns)} |")
    return "\n".join(lines)


def csv_text(rows: Sequence[dict], columns: Sequence[str]) -> str:
    """The rows as CSV with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _cell(row: dict, column: str) -> str:
    value, interval = row.get(column), row.get(f"{column}_ci")
    text = number(value)
    return f"{text} [{number(interval[0])}, {number(interval[1])}]" if interval else text


def number(value) -> str:
    """A value as a short text: three decimals, `-` for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
