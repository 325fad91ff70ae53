"""What is refused, and how: one line in OpenAI's format, no traceback, no path."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest
import requests

from server.app import Service
from server.limits import MOST_BODY
from tests.server.conftest import ROOT_WORDS, answering_of, running

MESSAGES = [{"role": "user", "content": "hi"}]


def refused(response: requests.Response, status: int = 400) -> str:
    """The line that says why."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in response.text
    assert not any(word in response.text for word in ROOT_WORDS)
    return error["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 2}, "n is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported (text only"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, "text only"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"nonsense": 1}, "nonsense is not supported by this server: leave it out"),
        ({"temperature": -1}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"stop": ["x"] * 17}, "stop: "),
        ({"stop": ""}, "stop"),
        ({"seed": 2**64}, "seed: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts of type text"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "tokens, the model's context is 256: shorten it"),
        ({"top_logprobs": 2}, "top_logprobs belongs to logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"stream_options": {}}, "stream_options belongs to stream"),
        ({"partinfer": {"max_loss": -1}}, "partinfer.max_loss: "),
        ({"partinfer": {"sparsity": 0.5}}, "partinfer.sparsity is not supported"),
        ({"partinfer": {"method": "dense", "max_loss": 0.1}}, "leave one of them out"),
    ],
)
def test_what_is_not_done_is_refused_by_name(server, fields, said):
    body = {"messages": MESSAGES, "max_tokens": 2, **fields}
    assert said in refused(server.post("/v1/chat/completions", body))
    if "messages" not in fields and "stream_options" not in fields:
        assert said in refused(server.post("/v1/chat/completions", body | {"stream": True}))


def test_what_is_not_used_may_be_said(server):
    unused = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "user": "me"}
    unused |= {"response_format": {"type": "text"}, "tool_choice": "none", "logprobs": False, "seed": None}
    unused |= {"stop": None, "stream": None, "stream_options": None, "partinfer": None, "temperature": 0}
    assert server.chat("hi", **unused)["usage"]["completion_tokens"]


def test_prompts_of_completions(server):
    for prompt, said in (
        ("", "no tokens"),
        ([], "no tokens"),
        (["a", "b"], "one prompt"),
        ([5000], "the model knows tokens 0 to 127"),
        ([-1], "prompt"),
        ({"a": 1}, "prompt"),
    ):
        assert said in refused(server.post("/v1/completions", {"prompt": prompt, "max_tokens": 2}))
    assert "echo is not supported" in refused(server.post("/v1/completions", {"prompt": "a", "echo": True}))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"messages": ' + b"[" * 100000])
def test_bodies_that_are_no_objects(server, body):
    sent = {"data": body, "headers": {"Content-Type": "application/json"}, "timeout": 60}
    refused(requests.post(f"{server.url}/v1/chat/completions", **sent))


def test_a_lone_surrogate_is_no_text(server):
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}'
    sent = {"data": body, "headers": {"Content-Type": "application/json"}, "timeout": 60}
    refused(requests.post(f"{server.url}/v1/chat/completions", **sent))


def test_bodies_are_bounded_and_json(server):
    url, json = f"{server.url}/v1/completions", {"Content-Type": "application/json"}
    large = b'{"prompt": "' + b"x" * MOST_BODY + b'"}'
    assert "larger than 4 MiB" in refused(requests.post(url, data=large, headers=json, timeout=60), 413)
    chunks = (large[i : i + 65536] for i in range(0, len(large), 65536))
    with contextlib.suppress(requests.ConnectionError):  # the server need not read to the end
        assert requests.post(url, data=chunks, headers=json, timeout=60).status_code == 413
    text = requests.post(url, data=b"{}", headers={"Content-Type": "text/plain"}, timeout=60)
    assert "must be JSON" in refused(text, 415)


def test_other_places_methods_and_models(server):
    refused(server.get("/nonsense"), 404)
    refused(server.get("/v1/completions"), 405)
    body = {"model": "gpt-5", "messages": MESSAGES}
    assert "tiny-chat is" in refused(server.post("/v1/chat/completions", body), 404)


def test_requests_for_another_host_are_refused_without_a_key(server):
    refused(server.get("/health", headers={"Host": "evil.example"}), 403)
    assert server.get("/health", headers={"Host": "localhost:1"}).status_code == 200


def test_nothing_is_said_to_pages_of_other_origins(server):
    answer = server.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    asked = requests.options(f"{server.url}/v1/completions", headers={"Origin": "http://evil.example"}, timeout=60)
    assert asked.status_code == 405


def test_a_key_is_asked_for(tiny_chat, bounded):
    answering, names = answering_of(tiny_chat, *bounded)
    with running(Service(answering, names, api_key="secret", local=False)) as made:
        body = {"messages": MESSAGES, "max_tokens": 2}
        assert "API key" in refused(made.post("/v1/chat/completions", body), 401)
        made.headers = {"Authorization": "Bearer wrong"}
        refused(made.post("/v1/chat/completions", body), 401)
        made.headers = {"Authorization": "Bearer secret"}
        assert made.post("/v1/chat/completions", body).status_code == 200
        refused(made.get("/metrics"), 401)
        assert made.get("/health").status_code == made.get("/").status_code == 200


def test_a_failure_of_the_server_says_nothing_about_it(tiny_chat, bounded, monkeypatch, capsys):
    answering, names = answering_of(tiny_chat, *bounded)
    with running(Service(answering, names)) as made:
        monkeypatch.setattr(answering.settings, "use", lambda _setting: Path("/root/nowhere/secret.bin").read_bytes())
        for more in ({}, {"stream": True}):
            said = refused(made.post("/v1/chat/completions", {"messages": MESSAGES, **more}), 500)
            assert said == "the server failed; its own output says why"
        monkeypatch.undo()
        assert made.chat("hi")["usage"]["completion_tokens"]  # it goes on
    assert "error: /root/nowhere/secret.bin: No such file" in capsys.readouterr().err


def test_a_body_that_does_not_come_holds_nothing_up(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        slow.sendall(head)
        assert server.chat("hi")["usage"]["completion_tokens"]


def test_beyond_the_queue_requests_are_told_to_come_again(tiny_chat, bounded):
    answering, names = answering_of(tiny_chat, *bounded, endless=True)
    with running(Service(answering, names, queue=2)) as made:
        body = {"prompt": "x", "max_tokens": 250}
        found: list[requests.Response] = []
        threads = [
            threading.Thread(target=lambda: found.append(made.post("/v1/completions", body)), daemon=True)
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        states = sorted(response.status_code for response in found)
        assert states.count(200) >= 3
        assert states.count(429) >= 1
        assert states.count(200) + states.count(429) == 12
        full = next(response for response in found if response.status_code == 429)
        refused(full, 429)
        assert int(full.headers["Retry-After"]) >= 1
