"""What the local tasks do with their rows: halves, prompts that lm-eval already has, and scores.

The first half of every data set is for calibration (neuron files, choices of settings, few-shot examples), the
second half is what is reported. lm-eval imports this file by its path, so it imports nothing of the project.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import cache
from pathlib import Path

import lm_eval.tasks
import yaml
from datasets import Dataset
from lm_eval.tasks.truthfulqa import utils as truthfulqa
from lm_eval.utils import apply_template
from rouge_score.rouge_scorer import RougeScorer

_ROUGE = ("rouge1", "rouge2", "rougeL")
_HEADING = re.compile(r"^\s*= [^=].* =\s*$")  # of an article; sections have more equals signs


def calibration_half(dataset: Dataset) -> Dataset:
    """The first half of the rows."""
    return dataset.select(range(len(dataset) // 2))


def report_half(dataset: Dataset) -> Dataset:
    """The second half of the rows."""
    return dataset.select(range(len(dataset) // 2, len(dataset)))


def wikitext_articles(dataset: Dataset) -> Dataset:
    """Lines of text to rows with one article each, in the field `page`."""
    articles: list[list[str]] = []
    for line in dataset["text"]:
        if _HEADING.match(line) or not articles:
            articles.append([])
        articles[-1].append(line)
    pages = ["\n".join(lines) for lines in articles]
    return Dataset.from_dict({"page": [page for page in pages if page.strip()]})


@cache
def _truthfulqa_template(task: str) -> str:
    """The prompt of lm-eval's own task, read from its file, so that scores can be compared."""
    path = Path(lm_eval.tasks.__file__).parent / "truthfulqa" / f"{task}.yaml"
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if "!function" not in line]
    return yaml.safe_load("\n".join(lines))["doc_to_text"]


def truthfulqa_choice_prompt(doc: dict) -> str:
    return apply_template(_truthfulqa_template("truthfulqa_mc1"), doc)


def truthfulqa_generation_prompt(doc: dict) -> str:
    return apply_template(_truthfulqa_template("truthfulqa_gen"), doc)


def truthfulqa_report_half(dataset: Dataset) -> Dataset:
    return truthfulqa.process_docs_gen(report_half(dataset))


def truthfulqa_scores(doc: dict, results: list[str]) -> dict[str, float]:
    """Similarity to the best true answer (`_max`), and whether that is nearer than the best false one (`_acc`)."""
    scores = truthfulqa.process_results_gen(doc, results)
    return {name: scores[name] for name in ("bleu_max", "bleu_acc", "rougeL_max", "rougeL_acc")}


def answer_scores(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match and F1 of words, of the best reference (SQuAD, arXiv 1606.05250)."""
    answer = _words(results[0])
    references = [_words(text) for text in doc["answers"]["text"]]
    return {
        "exact_match": max(float(answer == reference) for reference in references),
        "f1": max(_overlap(answer, reference) for reference in references),
    }


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def _overlap(answer: list[str], reference: list[str]) -> float:
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else float(answer == reference)


@cache
def _rouge() -> RougeScorer:
    return RougeScorer(_ROUGE, use_stemmer=True)


def article_scores(doc: dict, results: list[str]) -> dict[str, float]:
    """ROUGE F-measures against the `highlights` of a row."""
    return _summary_scores(doc["highlights"], results[0])


def document_scores(doc: dict, results: list[str]) -> dict[str, float]:
    """ROUGE F-measures against the `summary` of a row."""
    return _summary_scores(doc["summary"], results[0])


def _summary_scores(reference: str, summary: str) -> dict[str, float]:
    return {name: score.fmeasure for name, score in _rouge().score(reference, summary).items()}
