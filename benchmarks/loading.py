#!/usr/bin/env python3
"""Measure loading, whole, in part and from a pack: seconds with the files out of and in the page cache, and peak memory.

The floor is what the disk gives: the same reads with nothing done to the bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.speed.random_weights import RandomWeights, shape_config  # noqa: E402
from transformers_patches.config import PartInferConfig  # noqa: E402
from transformers_patches.families import family_of  # noqa: E402
from transformers_patches.files import scratch_folder  # noqa: E402
from transformers_patches.load.pack_writer import write_pack  # noqa: E402
from transformers_patches.neurons.random_ranking import random_ranking  # noqa: E402
from transformers_patches.weights.lookup import find_model  # noqa: E402
from transformers_patches.weights.model_files import read_config  # noqa: E402
from transformers_patches.weights.parallel_reads import BLOCK_BYTES, Read, run  # noqa: E402

# one load in a fresh process: prints seconds, and bytes
LOAD = """
import json, sys
import psutil
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model
from transformers_patches.cli import peak_memory_bytes

kernels.available()
before = psutil.Process().memory_info().rss
loaded = load_model(sys.argv[1], PartInferConfig(**json.loads(sys.argv[2])))
report = loaded.report
print(json.dumps({
    "seconds": report.seconds, "read": report.bytes_read, "weights": report.bytes_resident,
    "peak": peak_memory_bytes() - before,
}))
"""
ROOT = Path(__file__).resolve().parent.parent


def write_random_checkpoint(shape: str, folder: Path) -> Path:
    """A checkpoint folder of a known shape."""
    config = shape_config(shape)
    weights = RandomWeights(config, config.dtype)
    tensors = {}
    for name in sorted(weights.names()):
        tensors[name] = torch.empty(weights.shape(name), dtype=config.dtype)
        weights.read_into(name, tensors[name])
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> float:
    """Bytes per second of reading a folder's weights as loading does, and throwing them away."""
    reads = [
        Read(path, start, min(BLOCK_BYTES, path.stat().st_size - start))
        for path in sorted(folder.glob("*.safetensors"))
        for start in range(0, path.stat().st_size, BLOCK_BYTES)
    ]
    started = time.perf_counter()
    run(reads)
    return sum(read.size for read in reads) / (time.perf_counter() - started)


def load(folder: Path, settings: dict) -> dict:
    command = [sys.executable, "-c", LOAD, str(folder), json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(paths: dict[str, tuple[Path, dict]], repetitions: int) -> tuple[list[dict], dict[str, float]]:
    """Each path in turn, cold and then warm, round after round; and the disk alone, reading the first path's folder."""
    first = next(iter(paths.values()))[0]
    disk = []
    runs: dict[str, list[tuple[dict, dict]]] = {name: [] for name in paths}
    for _ in range(repetitions):
        evict(first)
        disk.append((read_all(first), read_all(first)))
        for name, (folder, settings) in paths.items():
            evict(folder)
            runs[name].append((load(folder, settings), load(folder, settings)))
    rows = []
    for name, pairs in runs.items():
        weights = pairs[0][0]["weights"]
        peak = max(run["peak"] for pair in pairs for run in pair)
        rows.append(
            {
                "path": name,
                "cold_s": statistics.median(cold["seconds"] for cold, _ in pairs),
                "warm_s": statistics.median(warm["seconds"] for _, warm in pairs),
                "bytes_read": pairs[0][0]["read"],
                "weight_bytes": weights,
                "peak_bytes": peak,
                "peak_over_weights": peak / weights,
            }
        )
    speeds = {"cold": statistics.median(c for c, _ in disk), "warm": statistics.median(w for _, w in disk)}
    return rows, speeds


def table(rows: list[dict]) -> str:
    lines = [
        "| load | cold s | warm s | MB read | MB of weights | peak MB | peak / weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['path']} | {row['cold_s']:.2f} | {row['warm_s']:.2f} | {row['bytes_read'] / 1e6:.0f} "
            f"| {row['weight_bytes'] / 1e6:.0f} | {row['peak_bytes'] / 1e6:.0f} | {row['peak_over_weights']:.3f} |"
        )
    return "\n".join(lines)


def prepare(files: Path, options: argparse.Namespace) -> dict[str, tuple[Path, dict]]:
    """What is loaded, and with which settings, by name; packs and random weights that are there already are taken."""
    if options.random_weights:
        folder = files / "model"
        if not folder.is_dir():
            folder.mkdir()
            write_random_checkpoint(options.random_weights, folder)
    else:
        folder = find_model(options.model_name)
    config = read_config(folder)
    neurons = files / "neurons.safetensors"
    size = family_of(config).intermediate_size(config)
    random_ranking(config.num_hidden_layers, size, seed=0).save(neurons)
    partial = {"loaded_neurons_percent": options.loaded_neurons_percent, "device": "cpu"}
    with_file = {**partial, "dataset_neurons_filepath": str(neurons)}
    paths = {}
    for dtype in options.dtypes.split(","):
        typed, pack = {**with_file, "dtype": dtype}, files / f"pack-{dtype}"
        if "pack" in options.loads and not pack.is_dir():
            write_pack(folder, pack, PartInferConfig(**typed))
        loads = {
            "dense": (folder, {"method": "dense", "device": "cpu", "dtype": dtype}),
            "partial": (folder, typed),
            "pack": (pack, partial),
        }
        paths |= {f"{name}, {dtype}": loads[name] for name in options.loads.split(",")}
    os.sync()  # what is still being written slows reading
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_name", help="a checkpoint folder, short name or hub id")
    source.add_argument("--random_weights", metavar="NAME", help="a known shape, written to disk first")
    parser.add_argument("--loaded_neurons_percent", type=float, default=0.7, help="of the partial loads (0.7)")
    parser.add_argument("--dtypes", default="auto", help="types of the weights, by comma (auto)")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds (3)")
    parser.add_argument("--loads", default="dense,partial,pack", help="some of dense, partial, pack (all)")
    parser.add_argument("--files", type=Path, help="folder where packs and random weights are kept for another run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    with scratch_folder("loading") as scratch:
        files = options.files or scratch
        files.mkdir(parents=True, exist_ok=True)
        paths = prepare(files, options)
        rows, disk = measure(paths, options.repetitions)
    print(f"disk alone: {disk['cold'] / 1e9:.2f} GB/s cold, {disk['warm'] / 1e9:.2f} GB/s warm")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "disk_bytes_per_second": disk}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
