"""Turns a record of a data set into a prompt for a task."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from texts.records import Record
from transformers_patches.errors import PartInferError

LANGUAGES = {"de": "German", "ro": "Romanian", "fr": "French", "en": "English"}
TEXT = "text"  # language modelling: no template, long documents are cut into pieces
TASK_TEMPLATES = {
    "QA": "Question: {text}\nAnswer: ",
    "Summarize": "Summarize the following document:\n{text}",
    **{
        f"translate_{source}_{target}": f"{LANGUAGES[source]} phrase: {{text}}\n{LANGUAGES[target]} phrase: "
        for source, target in (("de", "en"), ("ro", "en"), ("fr", "en"), ("en", "fr"))
    },
    TEXT: "{text}",
}
TASK_TYPES = tuple(TASK_TEMPLATES)

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.]*)\}")


@dataclass(frozen=True)
class Prompt:
    """A text for the model."""

    text: str  # with the template around it
    suffix: str = ""  # its end, which must be kept when the text is cut to a length


class Template:
    """Fills a task's template from records.

    task_type: one of TASK_TYPES
    fields: what {text} stands for, itself a template over the record's fields, such as `{context}\\n{question}` or
        `{translation.de}`; None: the first of the task's usual fields that a record has
    template: used instead of the task's own template; may name fields of the record
    """

    def __init__(self, task_type: str, fields: str | None = None, template: str | None = None) -> None:
        self.task_type, self.fields = task_type, fields
        self.template = TASK_TEMPLATES[task_type] if template is None else template
        names = _PLACEHOLDER.findall(self.template)
        if not names:
            raise PartInferError(
                f"the template {self.template!r} names no field: write for example 'Question: {{text}}'"
            )
        self.is_own = template is not None
        self._needs_text = "text" in names
        self.suffix = self.template[self.template.rindex("}") + 1 :]

    def fill(self, record: Record) -> Prompt:
        """The prompt of a record, empty if its text is; PartInferError, with its place, if a field is not text."""
        if self._needs_text:
            fields = self.fields or self._usual_fields(record)
            text = substitute(fields, record)
            if not text.strip():
                return Prompt("")
            text = text if self.task_type == TEXT else text.strip()  # documents keep their white space
            record = replace(record, fields={**record.fields, "text": text})
        return Prompt(substitute(self.template, record), self.suffix)

    def prefix(self) -> str:
        """The template up to its first field, for a model that writes its own texts."""
        return self.template[: self.template.index("{")].rstrip(" ")

    def _usual_fields(self, record: Record) -> str:
        for fields in usual_fields(self.task_type):
            if all(record.has(name) for name in _PLACEHOLDER.findall(fields)):
                return fields
        raise PartInferError(
            f"{record.where} has none of the usual fields of {self.task_type}, or nothing in them; it has {record.names}: "
            "name one with --text_field"
        )


def usual_fields(task_type: str) -> tuple[str, ...]:
    """The fields where records of a task may keep their text, in the order in which they are tried."""
    if task_type == "QA":
        return ("{context}\n{question}", "{question}", "{goal}", "{text}")
    if task_type == "Summarize":
        return ("{document}", "{article}", "{dialogue}", "{text}")
    if task_type.startswith("translate_"):
        source = task_type.split("_")[1]
        return (f"{{translation.{source}}}", f"{{{source}}}", "{text}")
    return ("{text}",)


def substitute(template: str, record: Record) -> str:
    """Replace {name} and {name.inner} by the record's texts; other braces are left alone. Raises as Record.text."""
    return _PLACEHOLDER.sub(lambda match: record.text(match.group(1)), template)
