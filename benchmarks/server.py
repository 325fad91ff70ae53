#!/usr/bin/env python3
"""What the server adds to each token: the same answer from the library and over HTTP, in turn, streamed.

"events alone" needs no quiet machine: what a token costs from the engine to the client if there is nothing to decode.

python benchmarks/server.py --model_name smollm2-135m
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from transformers_patches import cli, flags
from transformers_patches.errors import PartInferError

ROOT = Path(__file__).parent.parent
PROMPT = "Write a long story about a lighthouse keeper and the sea."


def over_http(address: str, tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and when each piece of text came."""
    host, port = address.removeprefix("http://").split(":")
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens, "stream": True, "temperature": 0}
    connection = http.client.HTTPConnection(host, int(port), timeout=600)
    started, times = time.perf_counter(), []
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            times.append(time.perf_counter())
    connection.close()
    return times[0] - started, times


def in_library(model, tokens: int) -> tuple[float, list[float]]:
    """The same from `generate`."""
    from transformers_patches.generation.generate import GenerationOptions, generate

    started, times = time.perf_counter(), []
    ids = model.prompt_ids([{"role": "user", "content": PROMPT}])
    options = GenerationOptions(max_new_tokens=tokens)
    generate(model.loaded, model.tokenizer, ids, options, lambda _piece: times.append(time.perf_counter()))
    return times[0] - started, times


def events_alone(pieces: int) -> float:
    """Milliseconds per token of a server without a model, its client in the same process: no more than this is added."""
    import uvicorn

    from server.engine import Engine
    from server.jobs import Done, Job, Piece, Started
    from server.objects import ChatAnswer
    from server.replies import EventStream
    from server.schema import ChatRequest
    from server.serve import open_socket
    from transformers_patches.generation.generate import GenerationResult

    def answer(job: Job) -> None:
        job.put(Started(1))
        for _ in range(pieces):
            job.put(Piece(" word"))
        job.put(Done(GenerationResult("", [], 1, 1, None, None, "stop"), 0, {}))

    engine, asked = Engine(answer), ChatRequest(messages=[{"role": "user", "content": "x"}], stream=True)

    async def app(scope, receive, send) -> None:
        await EventStream(engine, Job(asked), ChatAnswer("none", 0, None))(scope, receive, send)

    with open_socket("127.0.0.1", 0) as opened:
        running = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
        thread = threading.Thread(target=running.run, args=([opened],), daemon=True)
        thread.start()
        _, times = over_http(f"http://127.0.0.1:{opened.getsockname()[1]}", pieces)
        engine.close()
        running.should_exit = True
        thread.join()
    return milliseconds(times)


def milliseconds(times: list[float]) -> float:
    """Mean time between pieces."""
    return 1000 * (times[-1] - times[0]) / (len(times) - 1)


def measure(model, address: str, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, after one that is not counted, in ms."""
    ways = {"library": lambda: in_library(model, tokens), "server": lambda: over_http(address, tokens)}
    found = {name: {"first": [], "token": []} for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            first, times = way()
            if number:
                found[name]["first"].append(1000 * first)
                found[name]["token"].append(milliseconds(times))
    return {name: {what: median(values) for what, values in rows.items()} for name, rows in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_model(parser)
    flags.add_json(parser)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (128)")
    parser.add_argument("--rounds", type=int, default=5, help="of library and server in turn (5)")
    given = flags.parse(parser)
    if given.tokens < 2 or given.rounds < 1:
        raise PartInferError(f"tokens must be at least 2 and rounds 1, got {given.tokens} and {given.rounds}")
    cli.prepare_torch()
    from transformers_patches import load_model
    from transformers_patches.weights.lookup import find_model

    folder = find_model(given.model_name, given.checkpoint_path)
    command = [sys.executable, str(ROOT / "partinfer.py"), "--function", "serve", "--port", "0"]
    command += ["--checkpoint_path", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = next((found[0] for line in server.stderr if (found := re.search(r"http://\S+", line))), None)
            if address is None:
                raise PartInferError("the server did not start: run partinfer.py --function serve by itself to see why")
            found = measure(load_model(folder), address, given.tokens, given.rounds)
        finally:
            server.terminate()
    rows = [("", "first token, ms", "per token, ms")]
    rows += [(name, f"{row['first']:.1f}", f"{row['token']:.2f}") for name, row in found.items()]
    added = {what: found["server"][what] - found["library"][what] for what in ("first", "token")}
    rows.append(("added", f"{added['first']:.1f}", f"{added['token']:.2f}"))
    alone = median(events_alone(1000) for _ in range(given.rounds))
    rows.append(("events alone", "", f"{alone:.2f}"))
    cli.report(given.json, found | {"added": added, "events_alone": alone}, cli.aligned(rows))
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
