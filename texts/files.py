"""Files of texts as records: JSON lines and lists, CSV, TSV, Parquet and plain text, each also compressed with gzip.

Compression and Parquet are recognised by a file's first bytes, the rest by the ending of its name. Texts are UTF-8.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TextIO

from texts.records import Record
from transformers_patches.errors import PartInferError

ENCODING = "utf-8-sig"  # drops the byte order mark that some programs write
DOCUMENT_CHARACTERS = 16_384  # a plain text is read in pieces of about this size
LONGEST_FIELD = 2**31 - 1  # of a CSV file; the csv module's own bound is 131,072 characters
JSON_ENDINGS, TABLE_ENDINGS = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv", ".tab")
PLAIN_ENDINGS = (".txt", ".text", ".md", ".raw", ".tokens")
ENDINGS = (*JSON_ENDINGS, *TABLE_ENDINGS, ".parquet", *PLAIN_ENDINGS)
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_REFUSED = {  # first bytes -> what to say; UTF-32's begin like UTF-16's
    b"\xff\xfe\0\0": "is UTF-32: write it as UTF-8, such as with iconv -f UTF-32 -t UTF-8",
    b"\0\0\xfe\xff": "is UTF-32: write it as UTF-8, such as with iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "is UTF-16: write it as UTF-8, such as with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16: write it as UTF-8, such as with iconv -f UTF-16 -t UTF-8",
    b"PK\x03\x04": "is a ZIP archive or an office document: unpack it, or save its table as CSV",
    b"BZh": "is compressed with bzip2: unpack it, or use gzip",
    b"\xfd7zXZ\x00": "is compressed with xz: unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it, or use gzip",
    b"ARROW1": "is an Arrow file: give the folder that save_to_disk made, or write it as Parquet",
}


def has_known_ending(path: Path) -> bool:
    """Whether a name is that of a file of texts."""
    return _ending(path) in ENDINGS or path.suffix.lower() == ".gz"


def is_plain_text(path: Path) -> bool:
    """Whether a file is running text, not rows with fields."""
    return _kind(path) == "text"


def read_records(path: Path) -> Iterator[Record]:
    """The rows of a file one by one, each with its line; of plain text, its lines, stripped, without empty ones.

    Raises PartInferError, with file and line, for what is damaged, cut, not UTF-8, or of a kind that is not read.
    """
    kind = _kind(path)
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    with _opened_text(path, newline="" if kind == "table" else None) as file:
        if kind == "table":
            yield from _read_table(path, file)
        elif kind == "json":
            yield from _read_json(path, file)
        else:
            numbered = ((number, line.strip()) for number, line in enumerate(file, start=1))
            yield from (Record({"text": line}, _line(path, number)) for number, line in numbered if line)


def read_documents(path: Path) -> Iterator[Record]:
    """A plain text in large pieces, each ending with a whole line. Joined, they are the text.

    Raises PartInferError as read_records does.
    """
    piece: list[str] = []
    length, first, number = 0, 1, 0
    with _opened_text(path) as file:
        for number, line in enumerate(file, start=1):
            piece.append(line)
            length += len(line)
            if length >= DOCUMENT_CHARACTERS:
                yield Record({"text": "".join(piece)}, _line(path, first))
                piece, length, first = [], 0, number + 1
    if piece:
        yield Record({"text": "".join(piece)}, _line(path, first))


def _ending(path: Path) -> str:
    """The ending that says what kind of file it is, in lower case: `.csv` of `rows.csv.gz`."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _line(path: Path, number: int) -> str:
    return f"{path}, line {number}"


def _kind(path: Path) -> str:
    """`parquet`, `json`, `table` or `text`."""
    with _opened(path) as file:
        start = file.read(4096)
    if start.startswith(_PARQUET):
        return "parquet"
    for magic, reason in _REFUSED.items():
        if start.startswith(magic):
            raise PartInferError(f"{path} {reason}")
    ending = _ending(path)
    kinds = {"json": JSON_ENDINGS, "table": TABLE_ENDINGS, "text": PLAIN_ENDINGS}
    kind = next((kind for kind, endings in kinds.items() if ending in endings), None)
    if kind is None and ending == ".parquet":
        raise PartInferError(f"{path} is not a Parquet file (truncated?): fetch or make it again")
    if kind is None:
        raise PartInferError(
            f"{path}: expected a name that ends in {', '.join(ENDINGS)}, or one of these and .gz: rename the file"
        )
    if b"\0" in start:
        raise PartInferError(f"{path} is not text, or not UTF-8 (it has NUL bytes): write it as UTF-8")
    return kind


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked if it is compressed. Errors of files inside the block become PartInferErrors."""
    try:
        with open(path, "rb") as raw:
            packed = raw.peek(len(_GZIP))[: len(_GZIP)] == _GZIP
            with gzip.GzipFile(fileobj=raw) if packed else raw as file:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PartInferError(f"{path} can't be unpacked (truncated?): {error}; fetch or make it again") from None
    except OSError as error:
        raise PartInferError(f"{path} can't be read: {error.strerror or error}") from None


@contextmanager
def _opened_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file's text. newline: as `open` takes it."""
    with _opened(path) as file:
        try:
            yield io.TextIOWrapper(file, encoding=ENCODING, newline=newline)
        except UnicodeDecodeError:
            raise PartInferError(_where_undecodable(path)) from None


def _where_undecodable(path: Path) -> str:
    """Which line is not UTF-8; the text layer knows only a place in its buffer."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return (
                    f"{_line(path, number)} is not UTF-8 (byte 0x{byte:02x}, {error.start + 1} of the line): convert the "
                    "file, such as with iconv -f LATIN1 -t UTF-8"
                )
    return f"{path} is not UTF-8: convert it, such as with iconv -f LATIN1 -t UTF-8"


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise PartInferError(f"{where} is not JSON (truncated?): {reason}; expected an object on each line") from None


def _read_json(path: Path, file: TextIO) -> Iterator[Record]:
    """JSON lines, or one list of objects, which may take any number of lines."""
    first = True
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if first and _ending(path) == ".json" and line.lstrip().startswith("["):
            rows = _parsed(line + file.read(), str(path))
            for place, row in enumerate(rows, start=1):
                yield _object(row, f"{path}, row {place}")
            return
        first = False
        yield _object(_parsed(line, _line(path, number)), _line(path, number))


def _object(row: object, where: str) -> Record:
    if not isinstance(row, dict):
        raise PartInferError(f"{where}: expected an object, got {type(row).__name__}")
    return Record(row, where)


def _read_table(path: Path, file: TextIO) -> Iterator[Record]:
    """CSV or TSV: a header, then rows of as many fields; empty ones are null.

    A CSV file whose header has no comma is read with the semicolons or tabs that it has instead.
    """
    csv.field_size_limit(LONGEST_FIELD)
    first = file.readline()
    reader = csv.reader(chain([first], file), delimiter=_delimiter(path, first), strict=True)
    header: list[str] = []
    begin = 1
    try:
        for row in reader:
            where, begin = _line(path, begin), reader.line_num + 1
            if not header:
                header = row
                _check_header(header, where)
            elif row:
                if len(row) != len(header):
                    raise PartInferError(
                        f"{where} has {len(row)} fields, the header has {len(header)}: quote the texts"
                    )
                yield Record({name: value or None for name, value in zip(header, row, strict=True)}, where)
    except csv.Error as error:
        raise PartInferError(f"{_line(path, begin)} can't be read: {error}; quote texts as CSV does") from None


def _check_header(header: list[str], where: str) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise PartInferError(f"{where}: the header has {twice!r} twice: the first line must name the fields")


def _delimiter(path: Path, header: str) -> str:
    if _ending(path) != ".csv":
        return "\t"
    return next((character for character in ",;\t" if character in header), ",")


def _read_parquet(path: Path) -> Iterator[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    with _opened(path) as file:
        try:
            # the table's end is read first, which a compressed file can only do in memory
            table = ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{path}, row {number}")
        except (ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:150]
            raise PartInferError(f"{path} is not a Parquet file that can be read (truncated?): {reason}") from None
