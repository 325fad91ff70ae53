"""Many clients at once, and clients that go away."""

from __future__ import annotations

import json
import random
import threading

import pytest
import requests

REQUESTS = 200
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def body(number: int) -> dict:
    """A request of its own, whose answer can be told from the others'."""
    text = CHARACTERS[number % 52] * (3 + number % 7) + CHARACTERS[number // 52]
    return {"prompt": text, "max_tokens": 3 + number % 4, "temperature": 0}


class Client(threading.Thread):
    """Sends one request, whole or streamed; some go away after the first event."""

    def __init__(self, url: str, number: int, *, leaves: bool) -> None:
        super().__init__(daemon=True)
        self.url, self.number, self.leaves, self.text = url, number, leaves, None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.text = self._asked()
        except Exception as error:
            self.error = error

    def _asked(self) -> str | None:
        asked, url = body(self.number), f"{self.url}/v1/completions"
        if self.leaves:
            asked["max_tokens"] = 200
        elif self.number % 2:
            return requests.post(url, json=asked, timeout=300).json()["choices"][0]["text"]
        with requests.post(url, json=asked | {"stream": True}, stream=True, timeout=300) as response:
            assert response.status_code == 200, response.text
            lines = (line.removeprefix(b"data: ") for line in response.iter_lines() if line)
            if self.leaves:
                next(lines)
                return None
            *chunks, last = lines
            assert last == b"[DONE]"
            return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


def test_no_answer_is_lost_or_mixed_up(server):
    expected = {n: server.post("/v1/completions", body(n)).json()["choices"][0]["text"] for n in range(REQUESTS)}
    assert len(set(expected.values())) > REQUESTS // 4
    chosen = set(random.Random(5).sample(range(REQUESTS), REQUESTS // 4))
    clients = [Client(server.url, n, leaves=n in chosen) for n in range(REQUESTS)]
    for client in clients:
        client.join(300)
        assert client.error is None
    for client in clients:
        if not client.leaves:
            assert client.text == expected[client.number], client.number
    server.wait_until(lambda: not server.service.engine.busy and not server.service.engine.waiting)
    assert server.post("/v1/completions", body(3)).json()["choices"][0]["text"] == expected[3]


@pytest.fixture
def counted(server, monkeypatch):
    """The server, and a list of the tokens that it generates."""
    state, tokens = server.service.answering.loaded.state, []
    begin = state.begin_pass

    def counting(*args):
        tokens.append(args[1])
        begin(*args)

    monkeypatch.setattr(state, "begin_pass", counting)
    return server, tokens


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_ends_its_answer(counted, monkeypatch, streamed):
    server, tokens = counted
    cancelled_at: list[int] = []
    cancel = server.service.engine.cancel

    def watching(job):
        cancelled_at.append(len(tokens))
        cancel(job)

    monkeypatch.setattr(server.service.engine, "cancel", watching)
    slow = server.service.answering.loaded.model.generation_config
    assert slow.eos_token_id is None
    asked = {"prompt": "hi", "max_tokens": 240, "temperature": 0, "stream": streamed}
    if streamed:
        with requests.post(f"{server.url}/v1/completions", json=asked, stream=True, timeout=60) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(requests.Timeout):
            requests.post(f"{server.url}/v1/completions", json=asked, timeout=0.05)
    server.wait_until(lambda: not server.service.engine.busy)
    assert cancelled_at
    assert len(tokens) <= cancelled_at[0] + 2  # the pass that was running, and one that may have begun
    assert len(tokens) < 200


def test_who_leaves_the_queue_is_not_answered(server):
    long = {"prompt": "x", "max_tokens": 240, "temperature": 0, "stream": True}
    with requests.post(f"{server.url}/v1/completions", json=long, stream=True, timeout=60) as first:
        next(first.iter_lines())
        with pytest.raises(requests.Timeout):
            requests.post(f"{server.url}/v1/completions", json=body(1) | {"max_tokens": 200}, timeout=0.01)
        server.wait_until(lambda: server.service.engine.waiting == 0)
    server.wait_until(lambda: not server.service.engine.busy)
