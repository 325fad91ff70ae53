"""Whether files of weights are still what they were when they were opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from transformers_patches.errors import PartInferError


@dataclass(frozen=True)
class FileState:
    """What shows whether a file is still the same."""

    device: int  # number of the file system
    inode: int  # number of the file in it
    nbytes: int  # size of the file
    written_ns: int  # when it was last written, in nanoseconds

    @classmethod
    def of(cls, file: Path | int) -> FileState:
        """The state of a path, or of an open file."""
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class FilesInUse:
    """Files that are read by and by, each opened again by its name: a reader must not get parts of different ones."""

    def __init__(self) -> None:
        self._states: dict[Path, FileState] = {}

    def add(self, path: Path) -> None:
        """Begin to use a file."""
        if path not in self._states:
            self._states[path] = FileState.of(path)

    def check_unchanged(self) -> None:
        """Raise PartInferError if one of the files was written to, cut off, removed or replaced."""
        for path, state in self._states.items():
            if not path.exists() or FileState.of(path) != state:
                raise changed(path)


def changed(path: Path) -> PartInferError:
    """The message about a file of weights that was changed while it was in use."""
    return PartInferError(f"{path} was changed while it was in use: start again when it is complete")
