"""Instructions and GSM8K as local tasks: scores of answers, rows that are refused, and whole runs on a tiny model."""

from __future__ import annotations

import json
import shutil

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from evaluation.evaluate_task import main
from evaluation.results import result_path
from evaluation.tasks import local_instructions, local_math
from tests.evaluation.conftest import SETTINGS
from transformers_patches.errors import PartInferError

ROW = {
    "key": 7,
    "prompt": "?",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None}, {"num_words": 3, "relation": "at least"}],
}


@pytest.mark.parametrize(
    ("answer", "strict", "loose"),
    [
        ("one two three", [True, True], [True, True]),
        ("one, two", [False, False], [False, False]),
        ("Sure, here it is:\none two three", [False, True], [True, True]),  # without its first line
        (" \n", [False, False], [False, False]),  # nothing follows nothing
    ],
)
def test_answers_are_scored_by_prompt_and_by_instruction(answer, strict, loose):
    assert local_instructions.scores(ROW, [answer]) == {
        "prompt_level_strict_acc": float(all(strict)),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": float(all(loose)),
        "inst_level_loose_acc": loose,
    }


def test_shares_are_over_all_instructions():
    assert local_instructions.of_all_instructions([[True], [True, False, False]]) == 0.5


def test_rows_that_cannot_be_checked_are_refused():
    rows = local_instructions.builtin()["test"]
    assert local_instructions.checked(rows) is rows
    assert len({name for row in rows for name in row["instruction_id_list"]}) >= 20
    unknown = {**ROW, "instruction_id_list": ["language:response_language"], "kwargs": [{}]}
    with pytest.raises(PartInferError, match=r"language:response_language can't be checked here \(row 7\)"):
        local_instructions.checked(Dataset.from_list([unknown]))
    lacking = {**ROW, "kwargs": [{"num_words": None}, {"num_words": 3}]}
    with pytest.raises(PartInferError, match="row 7, length_constraints:number_words: missing"):
        local_instructions.checked(Dataset.from_list([lacking]))


@pytest.mark.parametrize(
    ("answer", "exact", "last"),
    [
        ("So 3 + 4 = 7.\n#### 1,207", 1, 1),
        ("#### $1207.00", 1, 1),
        ("It is 1207.", 0, 1),
        ("#### 12\nno, wait\n#### 1207 apples of 9", 1, 0),
        ("-1207", 0, 0),
        ("", 0, 0),
    ],
)
def test_numbers_are_compared_as_numbers(answer, exact, last):
    row = {"question": "?", "answer": "900 + 307 = <<900+307=1207>>1207\n#### 1,207"}
    assert local_math.number_scores(row, [answer]) == {"exact_match": exact, "last_number": last}


@pytest.fixture
def flags(model_folder, ranking_paths, tmp_path) -> list[str]:
    folder = shutil.copytree(model_folder, tmp_path / "chatty" / "tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    rows = [{"question": f"What is {i} and 1?", "answer": f"{i} and 1 is {i + 1}.\n#### {i + 1}"} for i in range(6)]
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "ifeval/input_data.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [ROW] if "ifeval" in name else rows
        path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    named = {"model_name": folder, "data_dir": tmp_path / "data", "output_path": tmp_path, "device": "cpu"}
    named |= SETTINGS | ranking_paths | {"gen_kwargs": "max_gen_toks=2", "limit": 2}
    return [f"--{name}={value}" for name, value in named.items()]


def test_whole_runs(flags, tmp_path):
    tasks = {
        "local_instructions": "prompt_level_strict_acc",
        "local_ifeval": "prompt_level_strict_acc",
        "local_gsm8k_chat": "exact_match",
        "local_gsm8k": "exact_match",
    }
    run = [*flags, "--apply_chat_template", "--task_type=QA", "--log_samples", f"--task_name={','.join(tasks)}"]
    assert main(run) == 0
    for task, metric in tasks.items():
        path = result_path(tmp_path, "tiny-llama", "partinfer", task)
        result = json.loads(path.read_text(encoding="utf-8"))
        assert metric in {row["metric"] for row in result["metrics"]}
        assert len(result["metrics"]) == (2 if "gsm8k" in task else 4)
        assert all(0 <= row["value"] <= 1 for row in result["metrics"])
    samples = (tmp_path / "tiny-llama" / "partinfer" / "local_gsm8k.samples.jsonl").read_text(encoding="utf-8")
    prompt = json.loads(samples.split("\n")[0])["arguments"][0][0]
    assert prompt.count("####") == 5  # worked examples


def test_instructions_are_asked_in_conversations(flags):
    with pytest.raises(PartInferError, match="--apply_chat_template"):
        main([*flags, "--task_name=local_instructions"])
