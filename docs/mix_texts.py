#!/usr/bin/env python3
"""Calibration texts for fits that shall serve several tasks: JSON lines with the field `text`, in a seeded order.

    python docs/mix_texts.py path/to/data --texts 450 --output results/neurons/mix.jsonl

Only calibration texts are read: the first half of every data set, and of wikitext-2's `valid` text. Half of the texts
are running text; the others are worked examples as the tasks show them to a model, several to a text where they are short.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from transformers_patches.files import write_text_atomic

CHARACTERS = 1000  # of a piece of running text: about 250 tokens
RUNNING_SHARE = 0.5


def first_half(path: Path) -> list[dict]:
    """The records of a JSON lines file that calibration may see."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return rows[: len(rows) // 2]


def running_texts(path: Path) -> Iterator[str]:
    """Pieces of the first half of a text, each beginning at a line."""
    piece, lines = "", path.read_text(encoding="utf-8").split("\n")
    for line in lines[: len(lines) // 2]:
        piece += line + "\n"
        if len(piece) >= CHARACTERS:
            yield piece
            piece = ""


def worked_examples(data: Path) -> dict[str, tuple[list[str], int]]:
    """Per data set: its examples, and how many make a text."""
    trivia = first_half(data / "triviaqa/triviaqa_sm_sub.jsonl")
    squad = first_half(data / "squad_v1/validation_xquad_en.jsonl")
    truthful = first_half(data / "truthfulqa/generation.jsonl")
    piqa = first_half(data / "piqa/validation.jsonl")
    solutions = [(row["goal"], row["sol1"] if row["label"] == 0 else row["sol2"]) for row in piqa]
    pairs = [row["translation"] for row in first_half(data / "ntrex/newstest2019_de-en.jsonl")]
    return {
        "triviaqa": ([f"Question: {row['question']}\nAnswer: {row['answer']}" for row in trivia], 6),
        "squad": (
            [
                f"Context: {row['context']}\n\nQuestion: {row['question']}\n\nAnswer: {row['answers']['text'][0]}"
                for row in squad
            ],
            1,
        ),
        "truthfulqa": ([f"Q: {row['question']}\nA: {row['best_answer']}" for row in truthful], 4),
        "piqa": ([f"Question: {goal}\nAnswer: {solution}" for goal, solution in solutions], 3),
        "translation": ([f"German phrase: {pair['de']}\nEnglish phrase: {pair['en']}" for pair in pairs], 3),
    }


def mix(data: Path, texts: int, seed: int) -> list[str]:
    """About `texts` texts (fewer where a data set ends), in a seeded order."""
    rng = random.Random(seed)
    running = list(running_texts(data / "wikitext2/valid.txt"))
    rng.shuffle(running)
    chosen = running[: round(RUNNING_SHARE * texts)]
    examples = worked_examples(data)
    of_each = round((1 - RUNNING_SHARE) * texts / len(examples))
    for rows, size in examples.values():
        rng.shuffle(rows)
        chosen += ["\n\n".join(rows[first : first + size]) for first in range(0, len(rows), size)][:of_each]
    rng.shuffle(chosen)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", type=Path, help="the folder with triviaqa, truthfulqa, squad_v1, piqa, ntrex, wikitext2"
    )
    parser.add_argument("--texts", type=int, default=450, help="how many (450)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (0)")
    parser.add_argument("--output", type=Path, required=True, help="the JSON lines file to write")
    arguments = parser.parse_args()
    try:
        texts = mix(arguments.data, arguments.texts, arguments.seed)
    except OSError as error:
        parser.error(f"the data sets can't be read: {error}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(arguments.output, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"{arguments.output}: {len(texts)} texts, {sum(map(len, texts))} characters")


if __name__ == "__main__":
    main()
