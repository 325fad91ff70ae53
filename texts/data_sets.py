"""Data sets as records: folders that download.py saved, and the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from texts.records import Record
from transformers_patches.errors import PartInferError
from transformers_patches.hub_tokens import checked_token, without_tokens


def read_saved(folder: Path, split: str | None) -> Iterator[Record]:
    """A data set saved by download.py with `save_to_disk` of the datasets library.

    split: None for `train`, or for the first split if there is no `train`. PartInferError if the folder or the split is
    not there.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except FileNotFoundError:
        raise PartInferError(
            f"{folder} is not a data set saved by download.py: give it, a file, or a hub name"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are OSErrors and ValueErrors
        raise PartInferError(f"{folder} can't be read: {_one_line(error)}; fetch the data set again") from None
    if not isinstance(saved, DatasetDict):
        return _numbered(saved, str(folder))
    split = split or ("train" if "train" in saved else next(iter(saved)))
    if split not in saved:
        raise PartInferError(f"{folder} has no split {split!r}; it has {', '.join(saved)}: give --dataset_split")
    return _numbered(saved[split], f"{folder}, {split}")


def read_hub(path: str, config: str | None, split: str, *, streaming: bool) -> Iterator[Record]:
    """A data set of the hub. streaming: row by row as it is read, instead of fetched and cached whole.

    Raises PartInferError if it can't be read.
    """
    from datasets import load_dataset

    checked_token(None)
    options = {"split": split, **({"streaming": True} if streaming else {})}
    try:
        try:
            rows = load_dataset(path, config, **options)
        except RuntimeError:  # a repository with a loading script: the hub has a Parquet copy of most of these
            rows = load_dataset(path, config, **options, revision="refs/convert/parquet")
        yield from _numbered(rows, path)
    except PartInferError:
        raise
    except Exception as error:  # the hub's clients raise whatever their transport raises
        raise PartInferError(
            f"can't read {path} (config {config}, split {split}) from the hub: {_one_line(error)}; "
            "give another data set, or a local file"
        ) from None


def _numbered(rows: Iterable, name: str) -> Iterator[Record]:
    yield from (Record(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1))


def _one_line(error: Exception) -> str:
    return (without_tokens(str(error)).splitlines() or [""])[0] or type(error).__name__
