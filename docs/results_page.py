#!/usr/bin/env python3
"""Put a model's tables and figures of `evaluation/report.py` into docs/results.md, in place of those that are there.

    python docs/results_page.py results SmolLM2-135M-Instruct

They go between `<!-- tables of MODEL -->` and `<!-- end of tables -->`; all other text of the page stays.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from transformers_patches import cli
from transformers_patches.errors import PartInferError
from transformers_patches.files import write_text_atomic

PAGE = Path(__file__).resolve().parent / "results.md"
# what the files of data sets are called in tables, and in the names of figures
DATA_SETS = {
    "test.txt": ("wikitext-2 test", "wikitext2"),
    "triviaqa_sm_sub.jsonl": ("TriviaQA answers", "triviaqa"),
    "validation_xquad_en.jsonl": ("SQuAD answers", "squad"),
}
_FIGURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


def section_of(report: str, model: str) -> str:
    """A model's part of a report, without its heading. Raises PartInferError if there is none."""
    for part in re.split(r"^## ", report, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        if heading.strip() == model:
            return text.strip()
    raise PartInferError(f"the report has no results of {model}: run the other stages first")


def with_tables(page: str, model: str, tables: str) -> str:
    """The page with other tables of a model. Raises PartInferError if it has no place for them."""
    begin, end = f"<!-- tables of {model} -->", "<!-- end of tables -->"
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise PartInferError(
            f"the page has no place for {model}: write the lines {begin} and {end} where its tables belong"
        )
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="folder with report.md")
    parser.add_argument("model", help="whose tables")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"the page ({PAGE.name} beside this script)")
    arguments = parser.parse_args(argv)
    if not (arguments.results / "report.md").is_file():
        raise PartInferError(f"no report.md in {arguments.results}: run evaluation/report.py first")
    tables = section_of((arguments.results / "report.md").read_text(encoding="utf-8"), arguments.model)
    names = {}
    for name in _FIGURE.findall(tables):
        names[name] = f"results_{name}"
        for file, (_, short) in DATA_SETS.items():
            names[name] = names[name].replace(f"_{file}_", f"_{short}_")
    page = with_tables(arguments.page.read_text(encoding="utf-8"), arguments.model, _named(tables, names))
    for name, copy in names.items():
        shutil.copyfile(arguments.results / name, arguments.page.parent / copy)
    write_text_atomic(arguments.page, page)
    print(f"{arguments.page}: tables of {arguments.model}, {len(names)} figures")
    return cli.DONE


def _named(tables: str, figures: dict[str, str]) -> str:
    """Tables with the names of data sets and of figures that the page has."""
    for old, new in figures.items():
        tables = tables.replace(f"({old})", f"({new})")
    for file, (title, _) in DATA_SETS.items():
        tables = re.sub(rf"^{re.escape(file)}, ", f"{title}, ", tables, flags=re.MULTILINE)
    return tables


if __name__ == "__main__":
    cli.run(main)
