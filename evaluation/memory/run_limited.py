"""One method on some prompts, in a process that its parent limits. Reads a job as JSON, prints a result as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
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


Reached = Callable[[int], bool]  # is told each token; whether to go on


class PartInfer:
    """A pack, checkpoint or GGUF file within `memory`, or without a bound of its own."""

    def __init__(self, job: dict) -> None:
        import torch

        from transformers_patches.load.loader import load_model
        from transformers_patches.plan.neuron_files import settings_for

        torch.set_num_threads(job["threads"])
        bound = {"memory": str(job["memory"])} if job.get("memory") else {}
        self.loaded = load_model(job["path"], settings_for(Path(job["path"]), job["settings"] | bound, "QA"))

    def answer(self, prompt: list[int], count: int, reached: Reached) -> None:
        import torch
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        from transformers_patches.generation.generate import generate_ids

        class Tell(StoppingCriteria):
            def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
                return torch.tensor([not reached(int(ids[0, -1]))])

        config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        generate_ids(
            self.loaded, torch.tensor([prompt]), config, None, stopping_criteria=StoppingCriteriaList([Tell()])
        )

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

    def answer(self, prompt: list[int], count: int, reached: Reached) -> None:
        self.model.reset()
        ids = prompt
        for _ in range(count):
            self.model.eval(ids)
            ids = [int(self.model.sample(temp=0.0))]
            if not reached(ids[0]):
                break

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

    def answer(self, prompt: list[int], count: int, reached: Reached) -> None:
        import torch

        ids, cache = prompt, None
        for _ in range(count):
            with torch.inference_mode():
                out = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
            if not reached(ids[0]):
                break

    def facts(self) -> dict:
        return {}


ENGINES = {"partinfer": PartInfer, "llama.cpp": LlamaCpp, "accelerate": Accelerate}


class Timing:
    """When the tokens of an answer came, and what had been read from disk by then. until: when it may go on no longer."""

    def __init__(self, engine: PartInfer | LlamaCpp | Accelerate, until: float) -> None:
        self.engine, self.until, self.tokens = engine, until, []
        self.times, self.disk = [time.perf_counter()], [disk_bytes()]

    def reached(self, token: int) -> bool:
        if not self.tokens:
            self.engine.facts()  # what is counted from here on is of decoding only
        self.tokens.append(token)
        self.times.append(time.perf_counter())
        self.disk.append(disk_bytes())
        return self.times[-1] < self.until

    def row(self) -> dict:
        begun, first, *_, last = self.times if len(self.times) > 2 else (*self.times, self.times[-1])
        before, prompt, *_, end = self.disk if len(self.disk) > 2 else (*self.disk, self.disk[-1])
        steps = len(self.tokens) - 1
        return {
            "first_token_s": first - begun,
            "tokens_per_second": steps / (last - first) if steps else None,
            "prompt_disk_mb": (prompt - before) / 1e6,
            "token_disk_mb": (end - prompt) / 1e6 / steps if steps else None,
        }


def measure(job: dict) -> dict:
    """Tokens/s of every prompt, and what that took. Ends early, with the prompts so far, after `seconds`."""
    if job["engine"] == "partinfer":  # as partinfer.py begins: before anything imports torch
        from transformers_patches import quick_start

        quick_start.begin()
    import psutil

    from transformers_patches import cli

    cli.prepare_torch()  # as all commands do
    started = time.perf_counter()
    engine = ENGINES[job["engine"]](job)
    load_s, rows, answers = time.perf_counter() - started, [], []
    for prompt in job["prompts"]:
        one = Timing(engine, started + job["seconds"])
        engine.answer(prompt, job["new_tokens"], one.reached)
        rows.append(one.row() | engine.facts())
        answers.append(one.tokens)
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
