"""Where calibration texts come from: the project itself, local files, data sets saved by download.py, or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from profiler.templates import TASK_TYPES, TEXT, Prompt, Template
from texts.data_sets import read_hub, read_saved
from texts.files import has_known_ending, is_plain_text, read_documents, read_records
from texts.records import Record
from transformers_patches.errors import PartInferError

BUILTIN, SELF = "builtin", "self"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"


@dataclass(frozen=True)
class HubDataset:
    """A data set of the original PartInfer on the hub."""

    path: str  # hub id
    task_type: str  # one of TASK_TYPES
    fields: str  # a template over the record's fields that gives the text
    config: str | None = None  # configuration; None: it has only one
    split: str = "train"


HUB_DATASETS = {
    "triviaqa": HubDataset("mandarjoshi/trivia_qa", "QA", "{question}", "rc.nocontext"),
    "squadv2": HubDataset("rajpurkar/squad_v2", "QA", "{context}\n{question}"),
    "mlqa": HubDataset("facebook/mlqa", "QA", "{context}\n{question}", "mlqa.en.en", "test"),
    "piqa": HubDataset("baber/piqa", "QA", "{goal}"),
    "wmt16_de_en": HubDataset("wmt/wmt16", "translate_de_en", "{translation.de}", "de-en"),
    "wmt16_ro_en": HubDataset("wmt/wmt16", "translate_ro_en", "{translation.ro}", "ro-en"),
    "wmt14_fr_en": HubDataset("wmt/wmt14", "translate_fr_en", "{translation.fr}", "fr-en"),
    "wmt14_en_fr": HubDataset("wmt/wmt14", "translate_en_fr", "{translation.en}", "fr-en"),
    "cnn_dailymail": HubDataset("abisee/cnn_dailymail", "Summarize", "{article}", "3.0.0"),
    "xsum": HubDataset("EdinburghNLP/xsum", "Summarize", "{document}"),
    "samsum": HubDataset("knkarthick/samsum", "Summarize", "{dialogue}"),
    "truthful_qa": HubDataset("truthfulqa/truthful_qa", "QA", "{question}", "generation", "validation"),
    "commonsense_qa": HubDataset("tau/commonsense_qa", "QA", "{question}"),
    "lambada": HubDataset("EleutherAI/lambada_openai", TEXT, "{text}", "default", "test"),
}


@dataclass(frozen=True)
class TextSource:
    """What to read, as the arguments of `python -m profiler run` say it. None: as the data set's name implies."""

    dataset: str  # a file, folder or hub id, BUILTIN or SELF
    task_type: str | None = None  # one of TASK_TYPES
    dataset_config: str | None = None  # configuration of a hub data set
    dataset_split: str | None = None  # split of a hub or saved data set
    text_field: str | None = None  # path of the text in a record
    template: str | None = None  # used instead of the task's own

    def resolve(self) -> ResolvedSource:
        """Fill in what the data set's name implies. PartInferError says what is missing or unknown."""
        known = (
            None if _local_path(self.dataset) else _known_hub_dataset(self.dataset, self.task_type, self.dataset_config)
        )
        task_type = self.task_type or (known.task_type if known else None) or _default_task_type(self)
        if task_type not in TASK_TYPES:
            raise PartInferError(f"unknown task type {task_type!r}: expected one of {', '.join(TASK_TYPES)}")
        fields = f"{{{self.text_field}}}" if self.text_field else (known.fields if known else None)
        return ResolvedSource(
            dataset=known.path if known else self.dataset,
            task_type=task_type,
            config=self.dataset_config or (known.config if known else None),
            split=self.dataset_split or (known.split if known else None),
            template=Template(task_type, fields, self.template),
        )


@dataclass(frozen=True)
class ResolvedSource:
    """A source of texts with nothing left open."""

    dataset: str  # a file, folder or hub id, BUILTIN or SELF
    task_type: str  # one of TASK_TYPES
    config: str | None  # configuration of a hub data set
    split: str | None  # split of a hub or saved data set
    template: Template  # makes prompts of records

    def prompts(self) -> Iterator[Prompt]:
        """The texts in the source's order, without empty ones. They are read one by one and not kept."""
        for record in self._records():
            prompt = self.template.fill(record)
            if prompt.text.strip():
                yield prompt

    @property
    def language_modelling(self) -> bool:
        """Whether the texts are plain documents, to be cut into pieces, rather than prompts."""
        return self.task_type == TEXT and not self.template.is_own

    def _records(self) -> Iterator[Record]:
        if self.dataset == BUILTIN:
            return _read_builtin(self.task_type)
        path = _local_path(self.dataset)
        if path is None:
            return read_hub(self.dataset, self.config, self.split or "train", streaming=True)
        if path.is_dir():
            return read_saved(path, self.split)
        return read_documents(path) if self.language_modelling and is_plain_text(path) else read_records(path)


def _default_task_type(source: TextSource) -> str:
    if source.template is not None or source.dataset == SELF:
        return TEXT
    raise PartInferError(f"--task_type is needed for {source.dataset}: one of {', '.join(TASK_TYPES)}")


def _known_hub_dataset(name: str, task_type: str | None, config: str | None) -> HubDataset | None:
    """A known data set by its short name, or by its path if config and task, where given, agree."""
    if name in HUB_DATASETS:
        return HUB_DATASETS[name]
    for known in HUB_DATASETS.values():
        if known.path == name and config in (None, known.config) and task_type in (None, known.task_type):
            return known
    return None


def _local_path(dataset: str) -> Path | None:
    """The path of a local data set; None for the hub's, the built-in texts and the model's own."""
    path = Path(dataset)
    if dataset in (BUILTIN, SELF):
        return None
    if path.exists():
        return path
    if has_known_ending(path) or dataset.startswith((".", "/", "~")):
        raise PartInferError(f"no data set at {dataset}: give a file, a folder made by download.py, or a hub data set")
    return None


def _read_builtin(task_type: str) -> Iterator[Record]:
    path = BUILTIN_FOLDER / f"{task_type.lower()}.jsonl"
    if not path.is_file():
        there = ", ".join(task for task in TASK_TYPES if (BUILTIN_FOLDER / f"{task.lower()}.jsonl").is_file())
        raise PartInferError(f"no built-in texts for task type {task_type}, only for {there}: give a --dataset")
    return read_records(path)
