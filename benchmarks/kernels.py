#!/usr/bin/env python3
"""Measure the CPU kernels beside PyTorch and a bandwidth probe, interleaved, on weights that no cache holds."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers_patches import kernels  # noqa: E402
from transformers_patches.weights.memory import WeightMemory  # noqa: E402

SHAPES = {  # name: (hidden_size, intermediate_size, whether the FFN has a gate)
    "llama3-3b": (3072, 8192, True),
    "llama3-1b": (2048, 8192, True),
    "opt-6.7b": (4096, 16384, False),
    "smollm2-135m": (576, 1536, True),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPUTED, BASE = 0.4, 0.3  # of the neurons: computed in decoding, and of those the ones that are always (the prefix)
LOADED, BY_UP = 0.7, 0.25  # of the neurons: candidates of the choice by up, and how many it keeps


@dataclass
class Measured:
    """One way of computing an operation."""

    shape: str  # of the weights, and what is computed
    path: str  # its name
    run: Callable[[int], object]  # computes layer i
    nbytes: float  # bytes of weights that a run reads
    layers: int  # how many layers are computed in turn
    seconds: list[float]  # of each run

    def report(self, probes: list[float], default: float | None) -> dict[str, object]:
        """probes: bytes per second that memory gave in each round, which may change between rounds."""
        median = statistics.median(self.seconds)
        return {
            "shape": self.shape,
            "path": self.path,
            "median_ms": median * 1e3,
            "best_ms": min(self.seconds) * 1e3,
            "gigabytes_per_second": self.nbytes / median / 1e9,
            "share_of_probe": statistics.median(
                self.nbytes / seconds / probe for seconds, probe in zip(self.seconds, probes, strict=True)
            ),
            "times_torch_default": default / median if default else None,
        }


@dataclass
class Ffn:
    """Some layers of one shape, with random weights, and the paths through them."""

    shape: str  # of the model that is imitated
    dtype: torch.dtype  # of the weights
    tokens: int  # computed at a time
    nbytes: int  # of the weights of all layers together, at least
    huge_pages: bool  # whether weights are in huge pages

    def __post_init__(self) -> None:
        self.hidden, self.neurons, self.gated = SHAPES[self.shape]
        self.memory = WeightMemory(huge_pages=self.huge_pages)  # as models have it
        self.x = torch.randn(self.tokens, self.hidden).to(self.dtype)
        self.computed, base = round(COMPUTED * self.neurons), round(BASE * self.neurons)
        self.base = base
        self.chosen = (base + torch.randperm(self.neurons - base)[: self.computed - base]).int()
        self.matrices = 3 if self.gated else 2
        self.float_layers = self.new_layers(self.matrices * self.hidden * self.neurons * self.dtype.itemsize)

    def new_layers(self, layer_bytes: int) -> list[list[Tensor]]:
        return [[self.new_weight() for _ in range(self.matrices)] for _ in range(self.count(layer_bytes))]

    def count(self, layer_bytes: int) -> int:
        return max(2, -(-self.nbytes // layer_bytes))

    def new_weight(self) -> Tensor:
        weight = self.memory.empty((self.neurons, self.hidden), self.dtype, torch.device("cpu"))
        return weight.normal_(std=self.hidden**-0.5)

    def measured(self, path: str, run: Callable[[int], object], nbytes: float, layers: int) -> Measured:
        return Measured(f"{self.shape} FFN", path, run, nbytes, layers, [])

    def torch_paths(self) -> Iterator[Measured]:
        weights = self.float_layers
        down_proj = [layer[-1].t().contiguous() for layer in weights]  # [H, N], as the model's own Linear holds it

        def dense(i: int) -> Tensor:
            first = F.linear(self.x, weights[i][0])
            h = F.silu(first) * F.linear(self.x, weights[i][1]) if self.gated else F.relu(first)
            return F.linear(h, down_proj[i])

        def dense_without_onednn(i: int) -> Tensor:
            with torch.backends.mkldnn.flags(enabled=False):
                return dense(i)

        nbytes = sum(w.nbytes for w in weights[0])
        yield self.measured("torch dense, default", dense, nbytes, len(weights))
        yield self.measured("torch dense, oneDNN off", dense_without_onednn, nbytes, len(weights))

    def native_paths(self, name: str, weights: list[list[kernels.Weight]]) -> Iterator[Measured]:
        everything = (self.neurons, None)
        sets = {
            "dense": everything,
            "0.4 prefix": (self.computed, None),
            "0.3 prefix + 0.1 list": (self.base, self.chosen),
        }
        for title, (prefix, index) in sets.items():
            count = prefix + (0 if index is None else len(index))
            run = self.native(weights, prefix, index)
            yield self.measured(f"{name} {title}", run, self.bytes_read(weights[0], count, None), len(weights))
        if self.gated:
            keep, loaded = round(BY_UP * self.neurons), round(LOADED * self.neurons)
            choice = {"size": torch.ones(self.neurons), "keep_count": keep}
            nbytes = sum(w.nbytes for w in weights[0]) / 3 * (loaded + 2 * keep) / self.neurons
            layouts = {
                "": [self.paired(*layer) for layer in weights],
                ", rows of gate and down not interleaved": weights,
            }
            for layout, held in layouts.items():
                run = self.native(held, loaded, None, **choice)
                yield self.measured(f"{name} by up, {BY_UP} of {LOADED}{layout}", run, nbytes, len(weights))
        else:
            bias = torch.full((self.neurons,), -1.2816)  # products are standard normal: a tenth is above 1.28
            run = self.native(weights, *everything, bias=bias)
            nbytes = self.bytes_read(weights[0], self.neurons, bias)
            yield self.measured(f"{name} dense, ReLU leaves a tenth", run, nbytes, len(weights))

    def paired(self, gate: kernels.Weight, up: kernels.Weight, down: kernels.Weight) -> list[kernels.Weight]:
        """The same weights as models that choose by up hold them: rows of gate and down interleaved."""
        pair = object()
        gate, down = (
            copied(weight, lambda part: self.memory.empty_paired((pair, part.dtype), part.shape, part.dtype))
            for weight in (gate, down)
        )
        return [gate, up, down]

    def native(
        self, weights: list, prefix: int, index: Tensor | None, bias: Tensor | None = None, **choice
    ) -> Callable[[int], object]:
        """bias: of fc1; choice: size and keep_count, if tokens choose among the active neurons."""
        activation, biases = "silu" if self.gated else "relu", [bias, *[None] * (self.matrices - 1)]
        layers = [kernels.Projections.of(list(zip(layer, biases, strict=True))) for layer in weights]
        active = [kernels.ActiveNeurons(layer, activation, prefix, index, **choice) for layer in layers]
        return lambda i: kernels.ffn(self.x, active[i])

    def bytes_read(self, layer: list[kernels.Weight], count: int, bias: Tensor | None) -> float:
        """Rows of fc2 that ReLU leaves at 0 for every token aren't read."""
        row_bytes = layer[0].nbytes / self.neurons
        if self.gated:
            return 3 * count * row_bytes
        products = kernels.linear(self.x, layer[0], bias)
        return count * row_bytes * (1 + (products > 0).any(0).float().mean().item())

    def paths(self) -> list[Measured]:
        name = str(self.dtype).removeprefix("torch.")
        paths = [*self.torch_paths(), *self.native_paths(name, self.float_layers)]
        for name, weight_format in kernels.FORMATS.items():
            one = [kernels.quantize(w, weight_format) for w in self.float_layers[0]]
            copies = range(self.count(sum(w.nbytes for w in one)))
            paths += self.native_paths(name, [[self.copy(w) for w in one] for _ in copies])
        return paths

    def copy(self, weight: kernels.QuantizedTensor) -> kernels.QuantizedTensor:
        return copied(weight, lambda part: self.memory.empty(part.shape, part.dtype, part.device))


def copied(weight: kernels.Weight, empty: Callable[[Tensor], Tensor]) -> kernels.Weight:
    """A copy in memory that `empty` gives."""
    new = weight.like(empty) if isinstance(weight, kernels.QuantizedTensor) else empty(weight)
    new.copy_(weight)
    return new


def linear_paths(ffn: Ffn) -> list[Measured]:
    """The square projection of attention: [H, H]."""
    count = ffn.count(ffn.hidden * ffn.hidden * ffn.dtype.itemsize)
    weights = [ffn.float_layers[i % len(ffn.float_layers)][0][: ffn.hidden].clone() for i in range(min(count, 64))]

    def without_onednn(i: int) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return F.linear(ffn.x, weights[i])

    shape, nbytes = f"{ffn.shape} [H, H]", weights[0].nbytes
    paths = [
        Measured(shape, "torch linear, default", lambda i: F.linear(ffn.x, weights[i]), nbytes, len(weights), []),
        Measured(shape, "torch linear, oneDNN off", without_onednn, nbytes, len(weights), []),
        Measured(shape, "native linear", lambda i: kernels.linear(ffn.x, weights[i]), nbytes, len(weights), []),
    ]
    for name, weight_format in kernels.FORMATS.items():
        packed = [kernels.quantize(w, weight_format) for w in weights]
        run = lambda i, packed=packed: kernels.linear(ffn.x, packed[i])  # noqa: E731
        paths.append(Measured(shape, f"native {name} linear", run, packed[0].nbytes, len(packed), []))
    return paths


def measure(paths: list[Measured], rounds: int, calls: int) -> list[float]:
    """Every path in turn, round after round; a probe at the start of each. Appends seconds per call to the paths."""
    probes = []
    for turn in tqdm(range(rounds + 1), desc=paths[0].shape, leave=False):
        probes.append(kernels.bandwidth_probe(repetitions=3))
        for path in paths:
            path.run(turn % path.layers)  # whatever ran before had the caches and the threads
            start = time.perf_counter()
            for call in range(calls):
                path.run((turn * calls + call + 1) % path.layers)
            path.seconds.append((time.perf_counter() - start) / calls)
    for path in paths:
        del path.seconds[0]  # warm-up
    return probes[1:]


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| shape | path | ms median | best | GB/s | of probe | × torch default |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        times = "" if row["times_torch_default"] is None else f"{row['times_torch_default']:.2f}"
        lines.append(
            f"| {row['shape']} | {row['path']} | {row['median_ms']:.3f} | {row['best_ms']:.3f} "
            f"| {row['gigabytes_per_second']:.1f} | {row['share_of_probe']:.0%} | {times} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="model shapes (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the unquantised weights")
    parser.add_argument("--tokens", type=int, default=1, help="rows of x (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of the interleaved measurement (default: 15)")
    parser.add_argument("--calls", type=int, default=4, help="calls timed together in a turn (default: 4)")
    parser.add_argument("--megabytes", type=int, default=400, help="weights to go through, so that no cache holds them")
    parser.add_argument("--no_huge_pages", action="store_true", help="weights in pages of 4 KB")
    parser.add_argument("--only", help="only paths with this in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    print(
        f"kernels: {kernels.variant()} {kernels.why_not()}, {torch.get_num_threads()} threads, {options.tokens} tokens"
    )
    for shape in options.shapes:
        ffn = Ffn(shape, DTYPES[options.dtype], options.tokens, options.megabytes * 10**6, not options.no_huge_pages)
        for paths in (ffn.paths(), linear_paths(ffn)):
            chosen = [path for path in paths if not options.only or options.only in path.path]
            if not chosen:
                continue
            probes = measure(chosen, options.rounds, options.calls)
            probe = statistics.median(probes)
            default = next((statistics.median(p.seconds) for p in chosen if p.path.endswith("default")), None)
            new = [path.report(probes, default) for path in chosen]
            print(
                f"\nprobe {probe / 1e9:.1f} GB/s ({min(probes) / 1e9:.1f} to {max(probes) / 1e9:.1f})\n{table(new)}",
                flush=True,
            )
            rows += [{**row, "probe_gigabytes_per_second": probe / 1e9} for row in new]
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
