"""Where calibration texts come from: the project itself, local files, data sets saved by download.py, or the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from profiler.templates import TASK_TYPES, TEXT, Prompt, Template
from transformers_patches.errors import PartInferError

BUILTIN, SELF = "builtin", "self"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
ENCODING = "utf-8-sig"  # drops the byte order mark that some programs write
DOCUMENT_CHARACTERS = 16_384  # a text file is read in pieces of about this size


@dataclass(frozen=True)
class HubDataset:
    """A data set of the original PartInfer on the hub."""

    path: str
    task_type: str
    fields: str  # a template over the record's fields that gives the text
    config: str | None = None
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

    dataset: str
    task_type: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    text_field: str | None = None
    template: str | None = None

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

    dataset: str
    task_type: str
    config: str | None
    split: str | None
    template: Template

    def prompts(self) -> Iterator[Prompt]:
        """The texts in the source's order, without empty ones. They are read one by one and not kept."""
        for number, record in enumerate(self._records(), start=1):
            prompt = self.template.fill(record, f"record {number} of {self.dataset}")
            if prompt.text.strip():
                yield prompt

    @property
    def language_modelling(self) -> bool:
        """Whether the texts are plain documents, to be cut into pieces, rather than prompts."""
        return self.task_type == TEXT and not self.template.is_own

    def _records(self) -> Iterator[Mapping]:
        if self.dataset == BUILTIN:
            return _read_builtin(self.task_type)
        path = _local_path(self.dataset)
        if path is None:
            return _stream_hub(self.dataset, self.config, self.split or "train")
        if path.is_dir():
            return _read_saved(path, self.split)
        return _read_file(path, documents=self.language_modelling)


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
    if path.suffix in _READERS or dataset.startswith((".", "/", "~")):
        raise PartInferError(f"no data set at {dataset}: give a file, a folder made by download.py, or a hub data set")
    return None


def _read_builtin(task_type: str) -> Iterator[Mapping]:
    path = BUILTIN_FOLDER / f"{task_type.lower()}.jsonl"
    if not path.is_file():
        there = ", ".join(task for task in TASK_TYPES if (BUILTIN_FOLDER / f"{task.lower()}.jsonl").is_file())
        raise PartInferError(f"no built-in texts for task type {task_type}, only for {there}: give a --dataset")
    return _read_jsonl(path)


def _read_file(path: Path, *, documents: bool) -> Iterator[Mapping]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise PartInferError(f"{path}: expected a file whose name ends in {', '.join(_READERS)}")
    if reader is _read_lines and documents:
        reader = _read_documents
    try:
        yield from reader(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise PartInferError(f"{path} can't be read as UTF-8 {path.suffix[1:]}: {error}; convert it first") from None


def _read_jsonl(path: Path) -> Iterator[Mapping]:
    with open(path, encoding=ENCODING) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise PartInferError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise PartInferError(f"{path}, line {number}: expected an object, got {type(record).__name__}")
            yield record


def _read_csv(path: Path) -> Iterator[Mapping]:
    with open(path, encoding=ENCODING, newline="") as file:
        yield from csv.DictReader(file)


def _read_lines(path: Path) -> Iterator[Mapping]:
    with open(path, encoding=ENCODING) as file:
        yield from ({"text": line.strip()} for line in file if line.strip())


def _read_documents(path: Path) -> Iterator[Mapping]:
    """A text file in large pieces, each ending with a whole line."""
    piece: list[str] = []
    length = 0
    with open(path, encoding=ENCODING) as file:
        for line in file:
            piece.append(line)
            length += len(line)
            if length >= DOCUMENT_CHARACTERS:
                yield {"text": "".join(piece)}
                piece, length = [], 0
    yield {"text": "".join(piece)}


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_lines}


def _read_saved(folder: Path, split: str | None) -> Iterator[Mapping]:
    """A data set saved by download.py with `save_to_disk` of the datasets library."""
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except FileNotFoundError:
        raise PartInferError(
            f"{folder} is not a data set saved by download.py: give it, a file, or a hub name"
        ) from None
    if not isinstance(saved, DatasetDict):
        return iter(saved)
    split = split or ("train" if "train" in saved else next(iter(saved)))
    if split not in saved:
        raise PartInferError(f"{folder} has no split {split!r}; it has {', '.join(saved)}: give --dataset_split")
    return iter(saved[split])


def _stream_hub(path: str, config: str | None, split: str) -> Iterator[Mapping]:
    from datasets import load_dataset

    try:
        try:
            rows = load_dataset(path, config, split=split, streaming=True)
        except RuntimeError:  # a repository with a loading script: the hub has a Parquet copy of most of these
            rows = load_dataset(path, config, split=split, streaming=True, revision="refs/convert/parquet")
        yield from rows
    except (OSError, ValueError, RuntimeError) as error:  # no network, unknown names, loading scripts
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PartInferError(
            f"can't read {path} (config {config}, split {split}) from the hub: {reason}; "
            "give another data set, a local file, --dataset builtin or --dataset self"
        ) from None
