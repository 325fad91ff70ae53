#!/usr/bin/env python3
"""Measure decoding on a GPU: tokens per second and bytes, against transformers' dense model in a CUDA graph.

Models are the demo model, where it is, and random weights in the shapes of 1B, 3B and 8B models. What matters most comes
first, and what does not fit into --seconds is left out; a line on standard error says what was measured or left out as
soon as it is known.

A token reads GB/token of weights, as counted. `of copy` is the share of what the GPU reaches when it copies memory.
`reached` is the speed-up over the baseline, as a share of the one that the bytes allow.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.speed.random_weights import RandomWeights, shape_config  # noqa: E402
from transformers_patches import cli, flags  # noqa: E402
from transformers_patches.config import PartInferConfig  # noqa: E402
from transformers_patches.errors import PartInferError  # noqa: E402
from transformers_patches.fast_pass.kv_cache import GrowingCache  # noqa: E402
from transformers_patches.fast_pass.recorded_pass import record_steps, recorded_pass  # noqa: E402
from transformers_patches.fast_pass.recording import Step, cuda_graph  # noqa: E402
from transformers_patches.load.loaded_model import LoadedModel  # noqa: E402
from transformers_patches.load.loader import load_from, load_model  # noqa: E402
from transformers_patches.plan.resolve import RunFiles  # noqa: E402
from transformers_patches.weights.lookup import find_model  # noqa: E402

DEMO = "smollm2-135m"
SHAPES = ("llama3-1b", "llama3-3b", "llama3-8b")
BASELINE = "transformers, CUDA graph"
WARM_UPS = 2  # tokens; the first one records the step
HEADER = (
    *("model", "method", "dtype", "GB/token", "tokens/s", "GB/s", "of copy", "× baseline", "bytes ÷", "reached"),
    *("peak GB", "prefill s"),
)


@dataclass(frozen=True)
class Subject:
    """What is measured of every model."""

    label: str
    settings: dict = field(default_factory=dict)
    recorded: bool = True  # whether steps are recorded


def subjects(sparsity: float, *, gpu: bool) -> list[list[Subject]]:
    """In the order of their importance; those in one list share a loaded model."""
    dense = {"method": "dense", "kernels": "torch"}
    plain = {"method": "partinfer", "loaded_neurons_percent": 1.0, "budget": "uniform", "compensation": "none"}
    sparse = plain | {"sparsity": sparsity, "selection": "up", "token_count": "average"}
    everything = [
        [Subject(BASELINE, dense), Subject("transformers", dense, recorded=False)],
        [Subject("partinfer", sparse)],
        [Subject("partinfer, exact count", sparse | {"token_count": "exact"})],
        *([Subject("partinfer", sparse | {"dtype": dtype})] for dtype in ("int8", "int4")),
        [Subject("dense", {"method": "dense", "dtype": "int4"})],
    ]
    if gpu:
        limited = plain | {"sparsity": sparsity, "selection": "core", "memory_limit": True}
        everything.append([Subject("partinfer --memory_limit", limited, recorded=False)])
    return everything


@dataclass
class Result:
    """One line of the table."""

    model: str
    method: str
    dtype: str
    bytes_per_token: int
    tokens_per_second: float
    copy_bytes_per_second: float
    peak_bytes: int | None
    prefill_s: float
    note: str
    speedup: float | None = None  # over the baseline
    byte_ratio: float | None = None  # the baseline's bytes over these

    def compare(self, baseline: Result | None) -> None:
        """Fill in what is relative to the baseline of the same model."""
        if baseline is not None:
            self.speedup = self.tokens_per_second / baseline.tokens_per_second
            self.byte_ratio = baseline.bytes_per_token / self.bytes_per_token

    def cells(self) -> tuple[str, ...]:
        """As HEADER has them."""
        reached = self.bytes_per_token * self.tokens_per_second
        compared = ("-",) * 3
        if self.speedup is not None:
            compared = f"{self.speedup:.2f}", f"{self.byte_ratio:.2f}", f"{self.speedup / self.byte_ratio:.0%}"
        return (
            *(self.model, self.method, self.dtype, f"{self.bytes_per_token / 1e9:.3f}"),
            *(f"{self.tokens_per_second:.1f}", f"{reached / 1e9:.0f}", f"{reached / self.copy_bytes_per_second:.0%}"),
            *(*compared, "-" if self.peak_bytes is None else f"{self.peak_bytes / 1e9:.2f}", f"{self.prefill_s:.3f}"),
        )


def copy_probe(device: torch.device, nbytes: int = 2**30) -> float:
    """Bytes per second, read and written, that a copy within the device's memory reaches: the best of some."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(8):
        seconds = timed(device, lambda: target.copy_(source))
        best = max(best, 2 * nbytes / seconds)
    return best


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds until the device is done."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load(place: Path | PretrainedConfig, settings: PartInferConfig, name: str) -> LoadedModel:
    """A model from its folder, or with random weights."""
    if isinstance(place, Path):
        return load_model(place, settings)
    return load_from(RandomWeights(place, torch.bfloat16), place, settings, RunFiles(), name)


@torch.inference_mode()
def decode(loaded: LoadedModel, prompt: torch.Tensor, tokens: int, *, recorded: bool) -> tuple[float, float, list[int]]:
    """Seconds of the prompt and of `tokens` greedy tokens, each of which the processor waits for, and the tokens."""
    model, step, cache, ids = loaded.model, recorded_pass(loaded.model) if recorded else None, GrowingCache(), []
    loaded.state.reset()

    def passed(token: torch.Tensor) -> torch.Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    logits: list[torch.Tensor] = []
    prefill = timed(loaded.device, lambda: logits.append(passed(prompt)))
    token = logits[0][:, -1:].argmax(-1)

    def go_on(count: int) -> None:
        nonlocal token
        for _ in range(count):
            ids.append(int(token))
            known = step is not None and step.ready(cache)
            token = (step.logits(token, cache) if known else passed(token))[:, -1:].argmax(-1)

    go_on(WARM_UPS)
    seconds = timed(loaded.device, lambda: go_on(tokens))
    if step is not None:
        step.finish()
    return prefill, seconds, ids


def measure(loaded: LoadedModel, subject: Subject, model: str, copied: float, arguments: argparse.Namespace) -> Result:
    """Medians over rounds of the same prompt."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, arguments.prompt_tokens)
    prompt = torch.randint(loaded.model.config.vocab_size, shape, generator=generator).to(loaded.device)
    on_gpu = loaded.device.type == "cuda"
    decode(loaded, prompt, 1, recorded=subject.recorded)
    for layer in loaded.state.layers:
        layer.reset_counters()
    rounds = [decode(loaded, prompt, arguments.tokens, recorded=subject.recorded) for _ in range(arguments.rounds)]
    prefill, seconds = (statistics.median(part[number] for part in rounds) for number in (0, 1))
    step = recorded_pass(loaded.model)
    return Result(
        model,
        subject.label,
        loaded.settings.dtype,
        loaded.token_bytes(),
        arguments.tokens / seconds,
        copied,
        torch.cuda.max_memory_allocated(loaded.device) if on_gpu else None,
        prefill,
        step.why_not if subject.recorded and step is not None else "",
    )


class Budget:
    """The time that there is, and whether a model of so many bytes fits into what is left of it."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.end = now() + seconds
        self._slowest = 0.0  # seconds for a byte, of what was measured so far

    def fits(self, nbytes: int) -> bool:
        """Whether it would fit, if it takes as long for its size as the slowest one so far."""
        return self.now() + self._slowest * nbytes < self.end

    def took(self, seconds: float, nbytes: int) -> None:
        """What loading and measuring a model of so many bytes took."""
        if nbytes > 5e8:  # small models take as long as their processes need
            self._slowest = max(self._slowest, seconds / nbytes)


def run(
    models: dict[str, Path | PretrainedConfig], device: torch.device, recorder: Callable[[Step], Step], arguments
) -> Iterator[Result]:
    """A result for each subject and model, in the order of the subjects' importance."""
    budget, copied, baselines = Budget(arguments.seconds), copy_probe(device, arguments.probe_bytes), {}
    sizes = {name: _bytes_of(place) for name, place in models.items()}
    for group in subjects(arguments.sparsity, gpu=device.type == "cuda"):
        for name, place in models.items():
            nbytes = sizes[name]
            if not budget.fits(nbytes):
                say(f"{name}, {group[0].label}: left out, no time")
                continue
            started = time.monotonic()
            for result in _measured(name, place, group, copied, (device, recorder, arguments)):
                if result.method == BASELINE:
                    baselines[name] = result
                result.compare(baselines.get(name))
                yield result
            budget.took(time.monotonic() - started, nbytes)


def _measured(name: str, place, group: list[Subject], copied: float, how: tuple) -> Iterator[Result]:
    """The subjects of a group, of one loaded model; what can't run is left out with a line."""
    device, recorder, arguments = how
    if device.type == "cuda":
        gc.collect()  # models and their recordings refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    settings = PartInferConfig(
        **{"device": str(device), "dtype": "bfloat16", "kernels": arguments.kernels} | group[0].settings
    )
    try:
        loaded = load(place, settings, name)
        if recorded_pass(loaded.model) is None and group[0].recorded:
            record_steps(loaded.model, loaded.state, recorder)
        for subject in group:
            yield measure(loaded, subject, name, copied, arguments)
    except (PartInferError, torch.OutOfMemoryError) as error:
        say(f"{name}, {group[0].label}: left out, {str(error).splitlines()[0]}")


def _bytes_of(place: Path | PretrainedConfig) -> int:
    if isinstance(place, Path):
        return sum(file.stat().st_size for file in place.glob("*.safetensors"))
    return RandomWeights(place, torch.bfloat16).total_bytes()


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help)
    parser.add_argument("--models", nargs="*", default=[DEMO, *SHAPES], help="the demo model's name, and shapes")
    parser.add_argument("--sparsity", type=float, default=0.4, help="share of the FFN bytes that a token reads (0.4)")
    parser.add_argument("--prompt_tokens", type=int, default=128, help="(128)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a round (64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each model (3)")
    parser.add_argument("--seconds", type=float, default=480, help="for everything; the rest is left out (480)")
    parser.add_argument("--probe_bytes", type=int, default=2**30, help="that the probe copies (2**30)")
    parser.add_argument("--device", default="cuda", help="cpu: only for tests of this script; steps aren't recorded")
    flags.add_json(parser)
    arguments = flags.parse(parser, argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PartInferError("this measures a GPU, and PyTorch sees none (docs/gpu.md)")
    on_gpu = device.type == "cuda"
    arguments.kernels = "auto" if on_gpu else "torch"
    models = {}
    for name in arguments.models:
        try:
            models[name] = Path(find_model(name)) if name == DEMO else shape_config(name)
        except PartInferError as error:
            say(f"{name}: left out, {error}")
    results = []
    for result in run(models, device, cuda_graph if on_gpu else lambda step: step, arguments):
        results.append(result)
        say(", ".join(f"{head} {cell}" for head, cell in zip(HEADER, result.cells(), strict=True)) + f" {result.note}")
    gpu = torch.cuda.get_device_name(device) if on_gpu else "a CPU, which says nothing"
    lines = [f"{gpu}, torch {torch.__version__}", cli.aligned([HEADER, *(result.cells() for result in results)])]
    cli.report(arguments.json, {"device": gpu, "results": [vars(result) for result in results]}, "\n".join(lines))
    return cli.DONE if results else cli.FAILED


if __name__ == "__main__":
    cli.run(main)
