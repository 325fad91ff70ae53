"""Answers of the server: tokens, streams, parameters, log-probabilities, usage."""

from __future__ import annotations

import json
import math

import pytest

import partinfer
from server.app import Service
from tests.server.conftest import answering_of, running

PROMPTS = ["hi", "Why is the sky blue?", "a " * 60]


def script(folder, capsys, *flags: str) -> dict:
    """What partinfer.py answers."""
    assert partinfer.main(["--checkpoint_path", str(folder), "--json", "--quiet", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def events(response) -> list[dict]:
    """The events of a stream, which has to end with [DONE]."""
    lines = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def plain(tiny_chat, bounded):
    """The tiny model with its end token."""
    answering, names = answering_of(tiny_chat, *bounded)
    with running(Service(answering, names)) as made:
        yield made


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "middle", "long"])
def test_answers_are_those_of_the_script(plain, tiny_chat, bounded, capsys, prompt):
    expected = script(tiny_chat, capsys, *bounded, "--prompt", prompt, "--num_tokens_to_generate", "12")
    for _ in range(3):  # later ones reuse the prompt's first tokens
        answer = plain.chat(prompt, max_tokens=12)
        assert answer["choices"][0]["message"]["content"] == expected["text"]
        assert answer["choices"][0]["finish_reason"] == expected["finish_reason"]
        assert answer["usage"]["completion_tokens"] == expected["generated_tokens"]
        assert answer["usage"]["prompt_tokens"] == expected["prompt_tokens"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] in (0, 128)


def test_seeded_samples_are_those_of_the_script(plain, tiny_chat, bounded, capsys):
    flags = ("--sampling-method", "top-p", "--temperature", "1.5", "--top_p", "0.8", "--top_k", "50", "--seed", "7")
    expected = script(tiny_chat, capsys, *bounded, *flags, "--prompt", "hi", "--num_tokens_to_generate", "20")
    sampling = {"temperature": 1.5, "top_p": 0.8, "top_k": 50, "seed": 7}
    for _ in range(2):
        answer = plain.chat("hi", max_tokens=20, **sampling)
        assert answer["choices"][0]["message"]["content"] == expected["text"]
    others = {plain.chat("hi", max_tokens=20, temperature=3.0)["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(others) > 1  # without a seed every answer is another


@pytest.mark.parametrize("bound", [0.02, 0.5])
def test_a_bound_on_the_loss_per_request(plain, tiny_chat, bounded, capsys, bound):
    flags = (*bounded[:2], "--max_loss", str(bound), "--device", "cpu")
    expected = script(tiny_chat, capsys, *flags, "--prompt", "hi", "--num_tokens_to_generate", "12")
    before = plain.chat("hi", max_tokens=12, partinfer={})
    answer = plain.chat("hi", max_tokens=12, partinfer={"max_loss": bound})
    assert answer["choices"][0]["message"]["content"] == expected["text"]
    assert answer["partinfer"]["max_loss"] == bound
    assert answer["partinfer"]["predicted_loss"] == pytest.approx(expected["predicted_loss"])
    assert answer["partinfer"]["ffn_bytes_share"] == pytest.approx(expected["computed_neurons_percent"])
    after = plain.chat("hi", max_tokens=12, partinfer={})
    for name in ("max_loss", "ffn_bytes_share", "bytes_per_token"):
        assert after["partinfer"][name] == before["partinfer"][name]
    assert after["choices"] == before["choices"]


def test_a_dense_answer_per_request(plain, tiny_chat, bounded, capsys):
    expected = script(tiny_chat, capsys, "--method", "dense", "--prompt", "hi", "--num_tokens_to_generate", "12")
    answer = plain.chat("hi", max_tokens=12, partinfer={"method": "dense"})
    assert answer["choices"][0]["message"]["content"] == expected["text"]
    assert answer["partinfer"]["ffn_bytes_share"] == 1.0
    assert answer["partinfer"]["predicted_loss"] == 0.0
    assert plain.chat("hi", partinfer={})["partinfer"]["ffn_bytes_share"] < 1.0


def test_what_would_need_a_reload_is_refused(tiny_chat, bounded):
    answering, names = answering_of(tiny_chat, *bounded[:2], "--sparsity", "0.4", "--start_num", "1", "--end_num", "4")
    with running(Service(answering, names)) as partial:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        for asked, word in (({"max_loss": 0.1}, "--max_loss"), ({"method": "dense"}, "70% are loaded")):
            response = partial.post("/v1/chat/completions", body | {"partinfer": asked})
            assert response.status_code == 400
            assert word in response.json()["error"]["message"]
            assert response.json()["error"]["code"] == "needs_reload"
        assert partial.get("/v1/models").json()["data"][0]["partinfer"]["bounds"] == []
        assert partial.chat("hi")["usage"]["completion_tokens"]


def test_a_stream_is_the_whole_answer(server):
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 20}
    whole = server.post("/v1/chat/completions", body).json()
    response = server.post("/v1/chat/completions", body | {"stream": True}, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *chunks, last = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(chunks) > 5
    assert (
        "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        == whole["choices"][0]["message"]["content"]
    )
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert len({chunk["id"] for chunk in (first, *chunks, last)}) == 1


def test_a_stream_says_what_each_token_read(server):
    options = {"include_usage": True, "partinfer": True}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
    found = events(server.post("/v1/chat/completions", body | {"stream": True, "stream_options": options}, stream=True))
    readings = [chunk["partinfer"] for chunk in found if chunk["choices"] and "layers" in chunk.get("partinfer", {})]
    assert [reading["token"] for reading in readings] == [1, 2, 3, 4, 5, 6]
    assert all(len(reading["layers"]) == 6 for reading in readings)
    assert readings[0]["layers"] == [1.0] * 6  # the prompt's pass computes everything
    assert all(0 < share <= 1 for reading in readings for share in reading["layers"])
    summary = next(c["partinfer"] for c in found if c["choices"] and c["choices"][0]["finish_reason"])
    shares = [share for reading in readings[1:] for share in reading["layers"]]
    assert sum(shares) / len(shares) == pytest.approx(summary["ffn_bytes_share"], abs=1e-3)
    assert found[-1]["usage"]["completion_tokens"] == 6
    assert found[-1]["choices"] == []


def test_completions_continue_texts_and_tokens(server):
    body = {"prompt": "once upon", "max_tokens": 10, "temperature": 0}
    whole = server.post("/v1/completions", body).json()
    assert whole["object"] == "text_completion"
    assert whole["usage"]["prompt_tokens"] == len("once upon")
    ids = server.service.answering.tokenizer("once upon")["input_ids"]
    for prompt in (ids, [ids], ["once upon"]):
        again = server.post("/v1/completions", body | {"prompt": prompt}).json()
        assert again["choices"] == whole["choices"]
    found = events(server.post("/v1/completions", body | {"stream": True}, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in found) == whole["choices"][0]["text"]


def test_a_stop_string_ends_the_text_before_it(server):
    text = server.chat("hi", max_tokens=30)["choices"][0]["message"]["content"]
    stop = text[6:8]
    for stops in (stop, [stop, "never comes"]):
        answer = server.chat("hi", max_tokens=30, stop=stops)["choices"][0]
        assert answer["message"]["content"] == text[: text.index(stop)]
        assert answer["finish_reason"] == "stop"


def test_logprobs_are_those_of_the_model(server):
    answer = server.chat("hi", max_tokens=5, logprobs=True, top_logprobs=3)["choices"][0]
    content = answer["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == answer["message"]["content"]
    for token in content:
        tops = [top["logprob"] for top in token["top_logprobs"]]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert token["logprob"] == tops[0]  # greedy
        assert sum(math.exp(top) for top in tops) <= 1.0 + 1e-6
        assert bytes(token["bytes"]).decode() == token["token"]
    body = {"prompt": "hi", "max_tokens": 5, "temperature": 0, "logprobs": 2}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [2] * 5
    assert choice["text"][choice["logprobs"]["text_offset"][3] :].startswith(choice["logprobs"]["tokens"][3])
    stream = events(server.post("/v1/completions", body | {"stream": True}, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in stream if chunk["choices"][0]["logprobs"]]
    assert sum((part["tokens"] for part in parts), []) == choice["logprobs"]["tokens"]
    assert sum((part["text_offset"] for part in parts), []) == choice["logprobs"]["text_offset"]


def test_messages_in_parts_and_developers_are_understood(server):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    one = server.chat("hi", messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}])
    other = server.chat("hi", messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}])
    assert one["choices"] == other["choices"]
    assert one["usage"]["prompt_tokens"] == len("s:be\nu:hi\na:")


def test_what_flags_say_holds_for_requests_that_say_nothing(tiny_chat, bounded):
    flags = (*bounded, "--num_tokens_to_generate", "3", "--system_prompt", "be", "--stop", "never")
    answering, names = answering_of(tiny_chat, *flags, endless=True)
    with running(Service(answering, names)) as made:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        answers = [made.post("/v1/chat/completions", body).json() for _ in range(2)]
        assert answers[0]["choices"] == answers[1]["choices"]  # greedy
        assert answers[0]["usage"]["completion_tokens"] == 3
        assert answers[0]["usage"]["prompt_tokens"] == len("s:be\nu:hi\na:")


def test_a_base_model_has_completions_only(tiny_chat, bounded):
    answering, names = answering_of(tiny_chat, *bounded, "--no_chat_template")
    with running(Service(answering, names)) as made:
        response = made.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
        assert response.status_code == 400
        assert "/v1/completions" in response.json()["error"]["message"]
        assert made.post("/v1/completions", {"prompt": "hi", "max_tokens": 2}).status_code == 200


def test_models_health_and_metrics(server):
    (model,) = server.get("/v1/models").json()["data"]
    assert model["id"] == "tiny-chat"
    assert server.get("/v1/models/tiny-chat").json() == model
    assert server.get("/v1/models/other").status_code == 404
    assert [b["sparsity"] for b in model["partinfer"]["bounds"]] == sorted(
        (b["sparsity"] for b in model["partinfer"]["bounds"]), reverse=True
    )
    assert server.get("/health").json()["status"] == "ok"
    before = server.get("/metrics").text
    server.chat("hi", max_tokens=4)
    after = server.get("/metrics").text

    def value(text: str, name: str) -> float:
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])

    assert value(after, "partinfer_generated_tokens_total") - value(before, "partinfer_generated_tokens_total") == 4
    for name in (
        "queue_length",
        "tokens_per_second",
        "computed_neurons_total",
        "decoded_bytes_total",
        "prefix_hit_rate",
    ):
        assert f"partinfer_{name} " in after
    assert 'partinfer_requests_total{endpoint="/v1/chat/completions",status="200"}' in after
