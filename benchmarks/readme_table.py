#!/usr/bin/env python3
"""The table at the top of the README: tokens/s, memory and loss of each way to run the demo model, measured in one go."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.windows import PREFILL_TOKENS, SCORED_TOKENS  # noqa: E402
from transformers_patches import cli  # noqa: E402
from transformers_patches.errors import PartInferError  # noqa: E402
from transformers_patches.files import scratch_folder, write_text_atomic  # noqa: E402

BEGIN, END = "<!-- readme_table: begin -->", "<!-- readme_table: end -->"
METHODS = {"dense": "`--method dense`", "partinfer": "`partinfer`, the default", "original": "the original's method"}


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    name: str  # of the method
    tokens_per_second: float  # in decoding
    resident_bytes: int  # weights in memory
    loss: float | None  # nats per token over the dense model; None if it was not measured


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model_name", default="smollm2-135m", help="a checkpoint folder, short name or hub id (smollm2-135m)")
    add(
        "--dataset",
        required=True,
        metavar="FILE",
        help="the text on which the loss is measured (wikitext-2's test text)",
    )
    add("--limit", type=int, default=40, help="windows of the text (40)")
    add("--repetitions", type=int, default=7, help="rounds of the speed measurement (7)")
    add("--task_type", default="QA", help="task whose neuron file is looked up (QA)")
    add("--update", metavar="FILE", help=f"put the table between {BEGIN} and {END} of this file, such as README.md")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    for name in ("dataset", "model_name"):  # the scripts run in the repository's folder
        if Path(getattr(options, name)).exists():
            setattr(options, name, str(Path(getattr(options, name)).resolve()))
    if options.update:
        replaced(_read(options.update), "")  # without markers there is no use in measuring
    compare = importlib.util.find_spec("llama_cpp") is not None
    if not compare:
        print("llama.cpp is left out: pip install llama-cpp-python adds it", file=sys.stderr)
    with scratch_folder("table") as scratch:
        speed = _json_of(speed_command(options, compare), scratch / "speed.json")
        quality = _json_of(quality_command(options, compare), scratch / "quality.json")
    text = f"{table(lines(speed['rows'], quality['rows']))}\n\n{caption(speed, quality)}"
    print(text)
    if options.update:
        write_text_atomic(options.update, replaced(_read(options.update), text))
    return cli.DONE


def speed_command(options: argparse.Namespace, compare: bool) -> list[str]:
    """evaluate_speed.py with all methods in one run: only rounds of one run can be compared."""
    command = ["evaluation/evaluate_speed.py", "--method", ",".join((*METHODS, "transformers")), *_common(options)]
    command += ["--repetitions", str(options.repetitions)]
    return [*command, "--compare", "llama.cpp"] if compare else command


def quality_command(options: argparse.Namespace, compare: bool) -> list[str]:
    """evaluate_perplexity.py with the same settings."""
    command = ["evaluation/evaluate_perplexity.py", "--method", ",".join(METHODS), *_common(options)]
    command += ["--dataset", options.dataset, "--limit", str(options.limit)]
    return [*command, "--compare", "llama.cpp"] if compare else command


def _common(options: argparse.Namespace) -> list[str]:
    return ["--model_name", options.model_name, "--task_type", options.task_type]


def _json_of(command: Sequence[str], path: Path) -> dict:
    """What a script of the repository writes; PartInferError if it fails, having printed the reason itself."""
    print("running", " ".join(command), file=sys.stderr)
    command = [sys.executable, *command, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise PartInferError(f"{command[1]} ended with code {done.returncode}: see above")
    return json.loads(path.read_text(encoding="utf-8"))


def lines(speed: Sequence[dict], quality: Sequence[dict]) -> list[Line]:
    """The lines of the table, from the rows of the two scripts.

    Of transformers the faster of its two rows is taken. Raises PartInferError if a row is missing.
    """
    found = []
    plain = [row for row in speed if row["method"] == "transformers"]
    if plain:
        best = max(plain, key=lambda row: row["decode_tokens_per_second"])
        found.append(_line("transformers, at its best", best, None))
    compared = {"llama.cpp": "llama.cpp"} if any(row["method"] == "llama.cpp" for row in speed) else {}
    for method, name in {**compared, **METHODS}.items():
        found.append(_line(name, _one(speed, method), _one(quality, method)["excess_nll"]))
    return found


def _line(name: str, row: dict, loss: float | None) -> Line:
    return Line(name, row["decode_tokens_per_second"], row["weight_bytes_resident"], loss)


def _one(rows: Sequence[dict], method: str) -> dict:
    """The row of a method; PartInferError if there is none."""
    for row in rows:
        if row["method"] == method:
            return row
    raise PartInferError(f"no row of {method} among {[row['label'] for row in rows]}")


def table(found: Sequence[Line]) -> str:
    """The lines as a Markdown table."""
    text = ["| | tokens/s | MB of weights | loss, nats/token |", "|---|---|---|---|"]
    for line in found:
        loss = "–" if line.loss is None else f"{line.loss:.3f}".replace("-0.000", "0.000")
        text.append(f"| {line.name} | {_rounded(line.tokens_per_second)} | {line.resident_bytes / 1e6:.0f} | {loss} |")
    return "\n".join(text)


def _rounded(value: float) -> str:
    """Three digits, as many as such a measurement has."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def caption(speed: dict, quality: dict) -> str:
    """The conditions of the measurement, in one paragraph."""
    return (
        f"{speed['model']} in {speed['rows'][0]['dtype']}, {speed['threads']} threads, {speed['kernels']} kernels. "
        f"Speed: medians of {speed['repetitions']} interleaved rounds, {speed['prompt_length']} prompt tokens, "
        f"{speed['new_tokens']} generated. Loss over dense: {quality['examples']} windows of {PREFILL_TOKENS} + "
        f"{SCORED_TOKENS} tokens."
    )


def replaced(text: str, new: str) -> str:
    """The text with `new` between the markers, which stay. PartInferError unless each is there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise PartInferError(f"expected one {BEGIN} and one {END} after it: put them where the table belongs")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.partition(END)[2]}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PartInferError(f"{path} can't be read: {error}") from None


if __name__ == "__main__":
    cli.run(main)
