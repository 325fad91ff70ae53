"""Files of texts: the same rows from every kind of file, and damage told with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from texts.files import read_documents, read_records
from transformers_patches.errors import PartInferError

ROWS = [{"q": "Wie groß, „wirklich“?", "a": "drei\nZeilen"}, {"q": "x" * 300_000, "a": "y"}]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def parquet(rows) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    sink = pyarrow.BufferOutputStream()
    write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def table(separator: str, newline: str = "\n") -> bytes:
    def quoted(text):
        return '"' + text.replace('"', '""') + '"'

    rows = [["q", "a"], *([quoted(row["q"]), quoted(row["a"])] for row in ROWS)]
    return (newline.join(separator.join(row) for row in rows) + newline).encode()


def lines() -> bytes:
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


KINDS = {
    "rows.jsonl": (lines, "line 1", "line 3"),
    "rows.ndjson": (lines, "line 1", "line 3"),
    "rows.json": (lambda: json.dumps(ROWS, indent=2).encode(), "row 1", "row 2"),
    "late.json": (lambda: b"\n\n" + json.dumps(ROWS, indent=2).encode(), "row 1", "row 2"),
    "few.json": (lines, "line 1", "line 3"),
    "rows.csv": (lambda: table(","), "line 2", "line 4"),
    "old.csv": (lambda: table(",", "\r\n"), "line 2", "line 4"),
    "semicolons.csv": (lambda: table(";"), "line 2", "line 4"),
    "ROWS.CSV": (lambda: table(","), "line 2", "line 4"),
    "rows.tsv": (lambda: table("\t"), "line 2", "line 4"),
    "rows.parquet": (lambda: parquet(ROWS), "row 1", "row 2"),
    "parquet.csv": (lambda: parquet(ROWS), "row 1", "row 2"),
}
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("change", ["as it is", "compressed", "compressed, named otherwise", "byte order mark"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, change):
    make, *places = KINDS[name]
    content = make()
    if change == "byte order mark":
        if b"PAR1" in content[:4]:
            pytest.skip("Parquet is no text")
        content = MARK + content
    elif change != "as it is":
        content = gzip.compress(content)
        name += ".gz" if change == "compressed" else ""
    (tmp_path / name).write_bytes(content)
    records = list(read_records(tmp_path / name))
    assert [dict(record.fields) for record in records] == ROWS
    assert [record.where for record in records] == [f"{tmp_path / name}, {place}" for place in places]


def test_empty_cells_are_null_and_empty_lines_no_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("\nq,a\n\n1,\n,2\n")
    assert [dict(record.fields) for record in read_records(path)] == [{"q": "1", "a": None}, {"q": None, "a": "2"}]


@pytest.mark.parametrize("name", ["text.txt", "text.md", "text.raw", "text.txt.gz"])
def test_plain_texts_are_lines_or_documents(tmp_path, name):
    text = "eins\n\n  zwei \u2028 noch zwei\n"  # only line feeds end lines
    content = MARK + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [record.text("text") for record in read_records(tmp_path / name)] == ["eins", "zwei \u2028 noch zwei"]
    assert [record.text("text") for record in read_documents(tmp_path / name)] == [text]


DEEP = "[" * 100_000
BROKEN = {
    "latin1.txt": ("ja\nGrö".encode("latin-1"), r"latin1.txt, line 2 is not UTF-8 \(byte 0xf6, 3 of the line\).*iconv"),
    "latin1.csv": ("q,a\nGrö,x".encode("latin-1"), "latin1.csv, line 2 is not UTF-8"),
    "latin1.jsonl": ('{}\n{"q": "ö"}'.encode("latin-1"), "latin1.jsonl, line 2 is not UTF-8"),
    "utf32.txt": ("Hallo".encode("utf-32"), "utf32.txt is UTF-32: write it as UTF-8"),
    "utf16.txt": ("Hallo".encode("utf-16"), "utf16.txt is UTF-16: write it as UTF-8"),
    "no-mark.txt": ("Hallo".encode("utf-16-le"), "NUL bytes"),
    "binary.csv": (b"a,b\n\x00\x01", "NUL bytes"),
    "cut.jsonl": (b'{"q": 1}\n{"q": 2}\n{"q": "tr', r"cut.jsonl, line 3 is not JSON \(truncated\?\)"),
    "deep.jsonl": (f'{{"q": {DEEP}'.encode(), "deep.jsonl, line 1 is not JSON .*too deep"),
    "digits.jsonl": (b'{"q": ' + b"1" * 9000 + b"}", "digits.jsonl, line 1 is not JSON"),
    "list.jsonl": (b"[1]\n", "line 1: expected an object, got list"),
    "numbers.json": (b"[\n1]", "row 1: expected an object, got int"),
    "object.json": (b'{\n"q": 1}', "line 1 is not JSON .*expected an object on each line"),
    "open-quote.csv": (b'q,a\n1,2\n3,"4\n5,6\n', "open-quote.csv, line 3 can't be read: .*quote texts"),
    "more.csv": (b"q,a\n1,2\n3,4,5\n", "more.csv, line 3 has 3 fields, the header has 2"),
    "fewer.tsv": (b"q\ta\n1\n", "fewer.tsv, line 2 has 1 fields, the header has 2"),
    "twice.csv": (b"q,q\n1,2\n", "line 1: the header has 'q' twice"),
    "cut.parquet": (b"PAR1\x15\x84", "cut.parquet is not a Parquet file that can be read"),
    "no.parquet": (b"q,a\n", "no.parquet is not a Parquet file"),
    "cut.jsonl.gz": (gzip.compress(b'{"q": 1}\n' * 50)[:-20], "cut.jsonl.gz can't be unpacked"),
    "begin.jsonl.gz": (b"\x1f\x8b\x08", "begin.jsonl.gz can't be unpacked"),
    "table.xlsx": (b"PK\x03\x04....", "ZIP archive or an office document"),
    "rows.jsonl.bz2": (b"BZh91AY", "compressed with bzip2"),
    "rows.dat": (b"q,a\n", r"rows.dat: expected a name that ends in .jsonl, .*rename"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line_with_file_and_line(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PartInferError, match=message) as raised:
        list(read_records(tmp_path / name))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert name in str(raised.value)


def test_triviaqa_is_read():
    path = DATA / "triviaqa" / "triviaqa_sm_sub.jsonl"
    if not path.is_file():
        pytest.skip("TriviaQA's rows are not there")
    records = list(read_records(path))
    assert len(records) == 3000
    assert records[1].text("question") == "What type of animal is a dik-dik?"
    assert records[1].text("answer") == records[1].text("aliases.1") == "Antelope"
