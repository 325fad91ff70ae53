#!/usr/bin/env python3
"""Measure starting: seconds from a command to its first token, or to its error, and the memory it takes.

Every command runs in a process of its own, in turn with the others; medians. `import torch` is the floor for whatever
computes with it. llama.cpp (llama-cpp-python) answers the GGUF files, too, if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers_patches import cli, flags  # noqa: E402
from transformers_patches.weights.lookup import find_model  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Why is the sky blue?"
LLAMA_CPP = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, verbose=False)
messages = [{"role": "user", "content": sys.argv[2]}]
for chunk in model.create_chat_completion(messages, max_tokens=1, temperature=0, stream=True):
    print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)
"""
HEADER = ("command", "seconds", "of the processor", "peak MB")


def commands(models: list[Path]) -> dict[str, list[str]]:
    """What is started, by a name for it."""
    partinfer = [sys.executable, str(ROOT / "partinfer.py")]
    asked = ["--prompt", PROMPT, "--num_tokens_to_generate", "1"]
    found = {"import torch": [sys.executable, "-c", "import torch; print(1)"]}
    for path in models:
        found[path.name] = [*partinfer, "--checkpoint_path", str(path), *asked]
        if path.suffix == ".gguf" and importlib.util.find_spec("llama_cpp"):
            found[f"{path.name}, llama.cpp"] = [sys.executable, "-c", LLAMA_CPP, str(path), PROMPT]
    found["error: a wrong flag"] = [*partinfer, "--wrong"]
    found["error: a wrong model"] = [*partinfer, "--model_name", "wrong"]
    nowhere = str(models[0].with_name("nowhere.safetensors"))
    found["error: no neuron file"] = [
        *(*partinfer, "--checkpoint_path", str(models[0]), "--dataset_neurons_filepath", nowhere)
    ]
    return found


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds until the first text, or the end if there is none; seconds of the processor and peak bytes until the end."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(measured: dict[str, list[tuple[float, float, float]]]) -> str:
    """A line for each command: medians of its runs."""
    lines = []
    for name, runs in measured.items():
        seconds, used, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        lines.append((name, f"{seconds:.2f}", f"{used:.2f}", f"{peak / 1e6:.0f}"))
    return cli.aligned([HEADER, *lines])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], help="names or paths (smollm2-135m)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command (3)")
    flags.add_json(parser)
    arguments = flags.parse(parser, argv)
    started = commands([find_model(name) for name in arguments.models])
    for command in started.values():  # files come into the page cache, caches are filled
        measure(command)
    measured = {name: [] for name in started}
    for _ in range(arguments.rounds):
        for name, command in started.items():
            measured[name].append(measure(command))
    cli.report(arguments.json, measured, table(measured))
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
