"""Record: one row of a file or data set, with its place, and what of its fields can be used as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers_patches.errors import PartInferError

_SHOWN = 12  # names of fields in a message


@dataclass(frozen=True)
class Record:
    """A row.

    fields: its values by name.
    where: its place for messages, such as `rows.csv, line 3`.
    """

    fields: Mapping[str, object]
    where: str

    @property
    def names(self) -> str:
        """The fields' names, for messages."""
        names = [str(name) for name in self.fields]
        return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")

    def has(self, path: str) -> bool:
        """Whether there is something other than null at a path, such as `translation.de`."""
        return not _is_null(_lookup(self.fields, path))

    def text(self, path: str) -> str:
        """The text at a path: names and list positions with dots between them, such as `answers.text.0`.

        Numbers are written out. An object with a text `value` and a list of `aliases`, as TriviaQA keeps its answers,
        stands for its value. Raises PartInferError for anything else: a field that is not there, null, true or false, a
        list, an object, bytes, and half of a surrogate pair.
        """
        found = _lookup(self.fields, path)
        if isinstance(found, Mapping) and isinstance(found.get("value"), str) and _is_list(found.get("aliases")):
            found = found["value"]
        if isinstance(found, str):
            return self._checked(found, path)
        if isinstance(found, int | float) and not isinstance(found, bool) and not _is_null(found):
            return str(found)
        raise PartInferError(f"{self.where}: {self._why_no_text(found, path)}")

    def _checked(self, text: str, path: str) -> str:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise PartInferError(
                    f"{self.where}: field {path!r} has half of a character, {text[error.start]!r}: write it whole"
                ) from None
        return text

    def _why_no_text(self, found: object, path: str) -> str:
        field = f"field {path!r}"
        if found is _MISSING:
            return f"there is no {field}, only {self.names or 'none at all'}"
        if _is_null(found):
            return f"{field} is null, expected a text: leave such rows out"
        if isinstance(found, Mapping):
            parts = [str(name) for name in found]
            example = f": name one of them, such as {{{path}.{parts[0]}}}" if parts else ", expected a text"
            return f"{field} is an object with {', '.join(parts[:_SHOWN]) or 'nothing in it'}{example}"
        if _is_list(found):
            example = f"one text: name the place, such as {{{path}.0}}" if found else "a text"
            return f"{field} is a list of {len(found)}, expected {example}"
        return f"{field} is {_in_json(found)}, expected a text"


_MISSING = object()


def _lookup(fields: Mapping, path: str) -> object:
    """What is at a path; _MISSING if nothing is."""
    if path in fields:  # a name with dots in it
        return fields[path]
    found: object = fields
    for part in path.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif _is_list(found) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return _MISSING
    return found


def _is_null(value: object) -> bool:
    """Whether there is nothing: tables write a missing text as NaN, too."""
    return value is None or value is _MISSING or (isinstance(value, float) and math.isnan(value))


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _in_json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"of type {type(value).__name__}"
