"""partinfer.py --function serve as a program: its messages, its flags, Ctrl-C."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import requests

import partinfer
from tests.conftest import ROOT
from transformers_patches.errors import PartInferError


def test_its_flags_are_its_own(capsys):
    for flags, said in (
        (["--port", "1"], "--port belongs to --function serve, got --function normal"),
        (["--function", "chat", "--api_key", "x"], "--api_key belongs to --function serve"),
        (["--function", "serve", "--port", "70000"], "port must be 0 to 65535, got 70000"),
        (["--function", "serve", "--api_key", ""], "api_key must be a text"),
    ):
        with pytest.raises(SystemExit) as ended:
            partinfer.main(flags)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_without_its_packages_it_says_how_to_get_them(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(SystemExit):
        partinfer.main(["--function", "serve"])
    assert "--function serve needs uvicorn: pip install -r requirements-serve.txt" in capsys.readouterr().err


def test_an_address_that_is_taken_is_one_line(tiny_chat, bounded):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(PartInferError, match=f"port {port} can't be used .*give another --host or --port"):
            partinfer.main(["--function", "serve", "--port", port, "--checkpoint_path", str(tiny_chat), *bounded])
    host = ["--host", "no.such.host.invalid"]
    with pytest.raises(PartInferError, match="host no.such.host.invalid"):
        partinfer.main(["--function", "serve", *host, "--checkpoint_path", str(tiny_chat), *bounded])


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_ends_at_once_and_cleanly(tiny_chat, bounded, sent, code):
    command = [sys.executable, str(ROOT / "partinfer.py"), "--function", "serve", "--port", "0"]
    command += ["--checkpoint_path", str(tiny_chat), *bounded]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as server:
        line = next(line for line in server.stderr if line.startswith("serving"))
        url = re.search(r"http://\S+", line).group()
        body = {"prompt": "hi", "max_tokens": 250, "temperature": 2.0, "stream": True, "seed": 1}
        with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=60) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            server.send_signal(sent)
            last = list(lines)[-1]
        assert last == b"data: [DONE]" or b"the server is stopping" in last
        assert server.wait(30) == code
        assert "Traceback" not in server.stderr.read()
