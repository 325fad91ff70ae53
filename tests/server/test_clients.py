"""Programs that people use: the openai package, and lm-eval's local-chat-completions."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import openai
import pytest

from tests.conftest import ROOT

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_openai_package(client, server):
    assert [model.id for model in client.models.list()] == ["tiny-chat"]
    asked = {"model": "tiny-chat", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    assert whole.choices[0].message.content == server.chat("hi")["choices"][0]["message"]["content"]
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage.completion_tokens == 8
    with_logprobs = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert len(with_logprobs.choices[0].logprobs.content) == 8
    bounded = client.chat.completions.create(**asked, extra_body={"partinfer": {"max_loss": 0.5}, "top_k": 5})
    assert bounded.model_extra["partinfer"]["max_loss"] == 0.5
    assert client.completions.create(model="tiny-chat", prompt="hi", max_tokens=3).choices[0].text is not None


def test_errors_are_the_openai_packages_own(client):
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        client.chat.completions.create(model="tiny-chat", messages=MESSAGES, n=2)
    with pytest.raises(openai.NotFoundError, match="gpt-5 is not served here") as found:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert found.value.code == "model_not_found"


TASK = """
task: tiny_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def test_lm_eval_runs_against_it(server, tmp_path):
    questions = ["hi", "and", "why?"]
    answers = [server.chat(q, max_tokens=6, stop=["\n"])["choices"][0]["message"]["content"] for q in questions]
    data = tmp_path / "questions.jsonl"
    rows = ({"question": q, "answer": a} for q, a in zip(questions, answers, strict=True))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_local.yaml").write_text(TASK.format(data=data))
    url = f"{server.url}/v1/chat/completions"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-chat-completions", "--tasks", "tiny_local"]
    command += ["--model_args", f"model=tiny-chat,base_url={url},num_concurrent=2,max_retries=1"]
    command += ["--include_path", str(tmp_path), "--apply_chat_template", "--output_path", str(tmp_path / "out")]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("results*.json")
    scores = json.loads(found.read_text())["results"]["tiny_local"]
    assert next(value for name, value in scores.items() if name.startswith("exact_match,")) == 1.0
