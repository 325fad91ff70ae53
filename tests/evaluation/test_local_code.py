"""HumanEval as a local task: from answers to programs, and whole runs on a tiny model."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from evaluation.answer_log import AnswerLog
from evaluation.evaluate_task import main
from evaluation.results import result_path
from evaluation.tasks import local_code
from tests.conftest import ROOT
from tests.evaluation.conftest import SETTINGS
from transformers_patches.errors import PartInferError

PROMPT = 'from typing import List\n\n\ndef half(x: int) -> int:\n    return x // 2\n\n\ndef quarter(xs: List[int]) -> List[int]:\n    """ A quarter of each. """\n'
TEST = "def check(candidate):\n    assert candidate([4, 8]) == [1, 2]\n"
PROBLEM = {
    "task_id": "T/0",
    "prompt": PROMPT,
    "entry_point": "quarter",
    "test": TEST,
    "canonical_solution": "    pass\n",
}
BODY = "    return [half(half(x)) for x in xs]\n"
WHOLE = f"def quarter(xs: List[int]) -> List[int]:\n{BODY}"
TESTS_ONE = "def check(candidate):\n    assert candidate() == 1\n"
HUMANEVAL = ROOT.parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl"


@pytest.mark.parametrize(
    "answer, passes",
    [(BODY, 1.0), ("    return xs\n", 0.0), ("    while True:\n        return [x // 4 for x in xs]\n", 1.0), ("", 0.0)],
)
def test_completions(answer, passes):
    assert local_code.completion_passes(PROBLEM, [answer]) == {"pass@1": passes}


@pytest.mark.parametrize(
    "answer, passes",
    [
        (f"Here it is:\n\n```python\n{WHOLE}```\n\nIt divides twice.", 1.0),
        (f"```python\n{WHOLE}", 1.0),  # cut before its end
        (f"```\n{WHOLE}\n```", 1.0),
        (f"```python\nhalf(8)\n```\nand\n```python\n{WHOLE}\n```", 1.0),
        (f"```python\n{BODY}\n```", 1.0),  # the body alone
        (WHOLE, 1.0),
        (f"```bash\npip install it\n```\n\n```python\n{WHOLE}\n```", 1.0),
        ("```python\ndef quarter(xs):\n    return xs\n```", 0.0),
        ("I can't do that.", 0.0),
    ],
)
def test_chats(answer, passes):
    assert local_code.chat_passes(PROBLEM, [answer]) == {"pass@1": passes}


def test_the_benchmarks_own_solutions_pass():
    if not HUMANEVAL.is_file():
        pytest.skip("the benchmark's file is not there")
    rows = [json.loads(line) for line in HUMANEVAL.read_text(encoding="utf-8").strip().split("\n")]
    for row in rows[32:164:33]:  # the first has a helper in its prompt
        own = row["prompt"][row["prompt"].rindex(f"def {row['entry_point']}(") :] + row["canonical_solution"]
        assert local_code.completion_passes(row, [row["canonical_solution"]]) == {"pass@1": 1.0}
        assert local_code.chat_passes(row, [f"```python\n{own}\n```\n"]) == {"pass@1": 1.0}


@pytest.fixture
def flags(model_folder, ranking_paths, tmp_path) -> list[str]:
    # whatever token a model writes after a comment sign, the program stays what it is
    prompts = ["def one():\n    return 1\n# ", "def one():\n    return 2\n# "]
    rows = [
        {"task_id": f"T/{i}", "prompt": prompt, "entry_point": "one", "canonical_solution": "", "test": TESTS_ONE}
        for i, prompt in enumerate(prompts)
    ]
    path = tmp_path / "data" / "humaneval" / "HumanEval.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    named = {"model_name": model_folder, "data_dir": tmp_path / "data", "output_path": tmp_path, "device": "cpu"}
    named |= SETTINGS | ranking_paths | {"gen_kwargs": "max_gen_toks=1", "task_name": "local_humaneval"}
    return [f"--{name}={value}" for name, value in named.items()]


def result(tmp_path, configuration: str) -> dict:
    path = result_path(tmp_path, "tiny-llama", configuration, "local_humaneval")
    return json.loads(path.read_text(encoding="utf-8"))


def test_generated_code_runs_only_if_that_is_allowed(flags):
    with pytest.raises(PartInferError, match="--run_generated_code"):
        main(flags)


def test_conversations_need_the_chat_template(flags):
    with pytest.raises(PartInferError, match="--apply_chat_template"):
        main([*flags, "--task_name=local_humaneval_chat", "--run_generated_code"])


def test_methods_and_limits_as_for_other_tasks(flags, tmp_path):
    assert main([*flags, "--run_generated_code", "--method=dense,partinfer"]) == 0
    for configuration in ("dense", "partinfer"):
        content = result(tmp_path, configuration)
        (metric,) = content["metrics"]
        assert (metric["metric"], metric["value"], content["rows"]) == ("pass@1", 0.5, {"local_humaneval": 2})
    assert main([*flags, "--run_generated_code", "--limit=1"]) == 0
    assert result(tmp_path, "partinfer")["metrics"][0]["value"] == 1.0


def test_a_chat(flags, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "chatty" / "tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    chat = ["--task_name=local_humaneval_chat", "--apply_chat_template", "--run_generated_code", "--log_samples"]
    assert main([*flags, *chat, f"--model_name={folder}", "--limit=1"]) == 0
    path = tmp_path / "tiny-llama" / "partinfer" / "local_humaneval_chat.samples.jsonl"
    sample = json.loads(path.read_text(encoding="utf-8"))
    assert sample["arguments"][0][0].endswith("```python\ndef one():\n    return 1\n# ```")
    assert sample["pass@1"] == 1.0  # one token more of the comment


def test_a_stopped_run_goes_on_with_the_next_problem(flags, tmp_path, monkeypatch):
    run = [*flags, "--run_generated_code", "--method=dense", "--skip_finished"]
    kept = []

    def stopped(self, kind, request, answer) -> None:
        if len(kept) == 1:
            raise KeyboardInterrupt
        add(self, kind, request, answer)
        kept.append(request[0])

    add = AnswerLog.add_partial
    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "add_partial", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(run)
    path = result_path(tmp_path, "tiny-llama", "dense", "local_humaneval").with_suffix(".answers.jsonl")
    assert path.read_text(encoding="utf-8").count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "add_partial", lambda self, *rest: (kept.append(rest[1][0]), add(self, *rest)))
        assert main(run) == 0
    assert len(kept) == len(set(kept)) == 2
    assert not path.exists()
    assert result(tmp_path, "dense")["metrics"][0]["value"] == 0.5


def test_half_lines_are_ignored_and_runs_never_mixed(tmp_path):
    path, asked = tmp_path / "a.jsonl", ("prompt", {"until": ["x"]})
    AnswerLog(path, {"limit": 1}).add_partial("generate_until", asked, "answer")
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "1')
    log = AnswerLog(path, {"limit": 1})
    assert log.get("generate_until", asked) == "answer"
    assert log.get("generate_until", ("prompt", {"until": ["y"]})) is None
    log.add_partial("loglikelihood", ("a", "b"), (-1.25, True))
    log.add_partial("loglikelihood_rolling", ("c",), -3.0)  # a sum of what is kept already
    again = AnswerLog(path, {"limit": 1})
    assert again.get("loglikelihood", ("a", "b")) == (-1.25, True)
    assert again.kept == 2
    with pytest.raises(PartInferError, match="answers of a run with other settings"):
        AnswerLog(path, {"limit": 2})
