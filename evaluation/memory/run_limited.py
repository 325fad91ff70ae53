"""One method on some prompts, in a process that its parent limits. Reads a job as JSON, prints a result as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)


def disk_bytes() -> int:
    """What the process has had read from disk so far, page faults included."""
    for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
        name, value = line.split(": ")
        if name == "read_bytes":
            return int(value)
    return 0


class PartInfer:
    """A pack, checkpoint or GGUF file within `memory`, or without a bound of its own."""

    def __init__(self, job: dict) -> None:
        from transformers_patches import quick_start

        given = dict(job["settings"])
        if job.get("memory"):
            given["memory"] = str(job["memory"])
            quick_start.begin()  # as partinfer.py does
        import torch

        from transformers_patches.load.loader import load_model
        from transformers_patches.plan.neuron_files import settings_for

        torch.set_num_threads(job["threads"])
        self.loaded = load_model(job["path"], settings_for(Path(job["path"]), given, "QA"))
        self.cache = None

    def prefill(self, prompt: list[int]) -> int:
        import torch

        from transformers_patches.fast_pass.one_token import new_cache

        self.cache = new_cache(self.loaded.model)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = self.loaded.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def step(self, token: int) -> int:
        import torch

        with torch.inference_mode():
            ids = torch.tensor([[token]])
            return int(self.loaded.model(ids, past_key_values=self.cache, use_cache=True).logits[0, -1].argmax())

    def facts(self) -> dict:
        rows = self.loaded.rows_on_disk
        counts = None if rows is None else rows.take_counts()
        hits = None if not counts or not counts.chosen else counts.found / counts.chosen
        return {"hit_rate": hits, "resident": self.loaded.run.resident}


class LlamaCpp:
    """A GGUF file through llama.cpp's map."""

    def __init__(self, job: dict) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            job["path"], n_ctx=512, n_threads=job["threads"], n_threads_batch=job["threads"], verbose=False
        )

    def prefill(self, prompt: list[int]) -> int:
        self.model.reset()
        self.model.eval(prompt)
        return int(self.model.sample(temp=0.0))

    def step(self, token: int) -> int:
        self.model.eval([token])
        return int(self.model.sample(temp=0.0))

    def facts(self) -> dict:
        return {}


class Accelerate:
    """The plain model, of which accelerate keeps on disk what does not fit."""

    def __init__(self, job: dict) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        room = max(50 * 10**6, job["limit"] - 900 * 10**6)  # the runtime, and one layer that is brought in
        self.model = AutoModelForCausalLM.from_pretrained(
            job["path"],
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": room},
            offload_folder=job["scratch"],
            local_files_only=True,
            trust_remote_code=False,
        )
        self.cache = None

    def prefill(self, prompt: list[int]) -> int:
        self.cache = None
        return self._pass(prompt)

    def step(self, token: int) -> int:
        return self._pass([token])

    def _pass(self, ids: list[int]) -> int:
        import torch

        with torch.inference_mode():
            out = self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def facts(self) -> dict:
        return {}


ENGINES = {"partinfer": PartInfer, "llama.cpp": LlamaCpp, "accelerate": Accelerate}


def measure(job: dict) -> dict:
    """Tokens/s of every prompt, and what that took. Ends early, with the prompts so far, after `seconds`."""
    import psutil

    from transformers_patches import cli

    cli.prepare_torch()  # as all commands do
    started = time.perf_counter()
    engine = ENGINES[job["engine"]](job)
    load_s, rows, answers = time.perf_counter() - started, [], []
    for prompt in job["prompts"]:
        before, begun = disk_bytes(), time.perf_counter()
        tokens = [engine.prefill(prompt)]
        first, read = time.perf_counter() - begun, disk_bytes()
        if job["engine"] == "partinfer":
            engine.facts()  # those of decoding only
        while len(tokens) < job["new_tokens"] and time.perf_counter() - started < job["seconds"]:
            tokens.append(engine.step(tokens[-1]))
        spent, steps = time.perf_counter() - begun - first, len(tokens) - 1
        rows.append(
            {
                "first_token_s": first,
                "tokens_per_second": steps / spent if steps else None,
                "prompt_disk_mb": (read - before) / 1e6,
                "token_disk_mb": (disk_bytes() - read) / 1e6 / steps if steps else None,
                **engine.facts(),
            }
        )
        answers.append(tokens)
        if time.perf_counter() - started > job["seconds"]:
            break
    return {
        "load_s": load_s,
        "prompts": rows,
        "answers": answers,
        "peak_mb": cli.peak_memory_bytes() / 1e6,
        "threads": psutil.Process().num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
