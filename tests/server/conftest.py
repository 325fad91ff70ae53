"""A tiny chat model, served in a thread of this process."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests
import uvicorn

import partinfer
from server.app import Service
from server.serve import make_answering, open_socket
from tests.conftest import ROOT, make_tiny_checkpoint
from tests.tiny_tokenizer import tiny_tokenizer
from tests.transformers_patches.plan.test_max_loss import with_curve
from transformers_patches.config import PartInferConfig
from transformers_patches.generation.options import generation_options

ROOT_WORDS = (str(ROOT), "site-packages", "Traceback", ".py")  # would tell about the machine
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@dataclass
class Running:
    """A server that runs, and a client for it."""

    service: Service
    url: str
    headers: dict[str, str] = field(default_factory=dict)

    def post(self, path: str, body: object, **options) -> requests.Response:
        return requests.post(self.url + path, json=body, headers=self.headers, timeout=120, **options)

    def get(self, path: str, **options) -> requests.Response:
        return requests.get(self.url + path, timeout=60, **options)

    def chat(self, text: str, **fields) -> dict:
        """The answer to one message, greedy unless told otherwise."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **fields}
        response = self.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    def wait_until(self, true: Callable[[], bool], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)


@contextmanager
def running(service: Service) -> Iterator[Running]:
    """Serve at a free port until the block's end."""
    with open_socket("127.0.0.1", 0) as opened:
        server = uvicorn.Server(uvicorn.Config(service.asgi, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
        thread.start()
        made = Running(service, f"http://127.0.0.1:{opened.getsockname()[1]}")
        made.wait_until(lambda: server.started)
        try:
            yield made
        finally:
            service.close()
            server.should_exit = True
            thread.join(10)
            service.engine.join(10)


def arguments(*flags: str) -> argparse.Namespace:
    return partinfer.build_parser().parse_args(["--function", "serve", "--quiet", *flags])


def answering_of(folder: Path, *flags: str, endless: bool = False):
    """A model and its names, as `--function serve` makes them. endless: without an end token."""
    given = arguments("--checkpoint_path", str(folder), *flags)
    made, names = make_answering(folder, PartInferConfig.from_arguments(given), generation_options(given), given)
    if endless:
        made.loaded.model.generation_config.eos_token_id = None
    return made, names


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory) -> Path:
    """A tiny chat model with a context of 256 tokens, one per character."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("served") / "tiny-chat", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bounded(tiny_chat) -> tuple[str, ...]:
    """Flags for a model whose neurons are all loaded, of which the curve says how many are read."""
    path = tiny_chat.parent / "qa.safetensors"
    with_curve().save(path)
    return ("--dataset_neurons_filepath", str(path), "--max_loss", "0.1", "--device", "cpu")


@pytest.fixture(scope="session")
def server(tiny_chat, bounded) -> Iterator[Running]:
    """The tiny model, which answers until it is told to stop."""
    answering, names = answering_of(tiny_chat, *bounded, endless=True)
    with running(Service(answering, names, local=True, queue=256)) as made:
        yield made
