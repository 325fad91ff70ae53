"""Resident memory: what is not loaded is not there after a forward pass, measured from outside in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from transformers_patches.neurons.fingerprint import fingerprint_of_model
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.weights.parallel_reads import AHEAD, BLOCK_BYTES

ROOT = Path(__file__).parents[3]
FRACTION_THAT_MUST_FALL = 0.9

# dense or partial, one forward pass over 16 tokens; prints bytes. (Decoding in PyTorch, without the kernels, then
# copies the neurons that the prompt chose.)
MEASURE = """
import json, sys
import psutil, torch
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model

folder, settings = sys.argv[1], json.loads(sys.argv[2])
loaded = load_model(folder, PartInferConfig(device="cpu", **settings))
with torch.no_grad():
    loaded.model(torch.arange(16)[None], use_cache=True)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
mapped = sum(part.rss for part in psutil.Process().memory_maps() if part.path.startswith(folder))
plan, config = loaded.plan, loaded.model.config
left_out = sum(plan.intermediate_size - layer.loaded_count for layer in plan.layers.values())
print(json.dumps({
    # without the code of libraries, of which more is there the more of it ran
    "resident": int(status["RssAnon"].split()[0]) * 1024 + mapped,
    "unloaded": left_out * 3 * config.hidden_size * loaded.model.dtype.itemsize,
    "weights": loaded.report.bytes_resident,
}))
"""


# peak above what was there before loading, another model having been loaded; anonymous memory only, so that the code of
# libraries and cached files don't count; prints bytes
MEASURE_PEAK = """
import ctypes, json, sys, threading, time
from transformers_patches.config import PartInferConfig
from transformers_patches.load.loader import load_model

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def sample():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.0005)

small, big, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
load_model(small, PartInferConfig(device="cpu", method="dense", dtype=settings["dtype"]))
ctypes.CDLL(None).malloc_trim(0)
before, seen, done = anonymous(), [], threading.Event()
thread = threading.Thread(target=sample)
thread.start()
loaded = load_model(big, PartInferConfig(device="cpu", **settings))
done.set()
thread.join()
print(json.dumps({
    "peak": max(seen) - before, "after": anonymous() - before, "weights": loaded.report.bytes_resident,
    "samples": len(seen),
}))
"""


def measure(folder: Path, **settings) -> dict[str, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, str(folder), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_that_memory_falls(folder: Path, neuron_file: Path, **settings) -> None:
    dtype = settings["dtype"]
    dense = measure(folder, method="dense", dtype=dtype)
    partial = measure(folder, dataset_neurons_filepath=str(neuron_file), **settings)
    assert dense["weights"] - partial["weights"] == partial["unloaded"]
    assert dense["resident"] - partial["resident"] >= FRACTION_THAT_MUST_FALL * partial["unloaded"]


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory) -> Path:
    """A Llama of 6 layers, 4 of them sparse: 236 MB in float32, 227 MB of it FFNs."""
    folder = tmp_path_factory.mktemp("big")
    config = AutoConfig.for_model(
        "llama",
        hidden_size=512,
        intermediate_size=6144,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=64,
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = {
        name: torch.ones(p.shape) if p.ndim == 1 else torch.empty(p.shape).uniform_(-0.05, 0.05)
        for name, p in model.named_parameters()
    }
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ranking = torch.stack([torch.randperm(6144, generator=torch.Generator().manual_seed(layer)) for layer in range(6)])
    NeuronFile(ranking).save(folder / "neurons.safetensors")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16", "method": "coreinfer", "use_partial_loading": True},  # converted while loading
    ],
    ids=["partinfer float32", "coreinfer bfloat16"],
)
def test_memory_falls_by_what_is_not_loaded(big_checkpoint, settings):
    fractions = {"loaded_neurons_percent": 0.3, "sparsity": 0.2, "base_neurons_percent": 0.1}
    layers = {"start_num": 1, "end_num": 4}
    check_that_memory_falls(big_checkpoint, big_checkpoint / "neurons.safetensors", **settings, **fractions, **layers)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
@pytest.mark.parametrize("method, dtype", [("dense", "int4"), ("partinfer", "int8"), ("partinfer", "int4")])
def test_peak_memory_is_the_quantized_model_and_one_tensor(big_checkpoint, tiny_checkpoints, method, dtype):
    settings = {"dtype": dtype, "method": method}
    if method == "partinfer":
        settings |= {
            "start_num": 1,
            "end_num": 4,
            "dataset_neurons_filepath": str(big_checkpoint / "neurons.safetensors"),
        }
    command = [sys.executable, "-c", MEASURE_PEAK, str(tiny_checkpoints["llama"]), str(big_checkpoint)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, json.dumps(settings)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    one_tensor = 6144 * 512 * 4  # float32 as in the file
    reading = AHEAD * BLOCK_BYTES
    weights = measured["weights"]
    assert measured["samples"] > 20
    assert weights < measured["peak"] < weights + one_tensor + reading
    assert measured["after"] < weights * 1.03 + 2**22  # and the plan, the tables of the rotary embedding, …
    floats = weights * 16 / {"int8": 8.5, "int4": 4.5}[dtype]
    assert one_tensor + reading < floats / 2  # the model in bfloat16, even half of it, would be found


@pytest.mark.model
def test_memory_of_the_demo_model_falls_by_what_is_not_loaded(demo_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(config.intermediate_size, generator=generator) for _ in range(config.num_hidden_layers)]
    neurons = NeuronFile(torch.stack(rows), metadata={"fingerprint": fingerprint_of_model(model)})
    neurons.save(tmp_path / "neurons.safetensors")
    # few, because the system counts weights in pages of 2 MB and frees of the C library come and go by as much
    fractions = {"loaded_neurons_percent": 0.3, "sparsity": 0.2}
    for dtype in ("bfloat16", "float32"):
        check_that_memory_falls(demo_model, tmp_path / "neurons.safetensors", dtype=dtype, **fractions)
