"""Loads a model for profiling on a device where it fits, or refuses before anything is loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.load.loader import load_model
from transformers_patches.load.threads import check_threads
from transformers_patches.modules.fast_linear import replace_linears
from transformers_patches.neurons.fingerprint import fingerprint
from transformers_patches.plan.machine import decide_dtype, decide_kernels, resolve_device
from transformers_patches.weights.file_kinds import is_gguf
from transformers_patches.weights.lookup import model_name
from transformers_patches.weights.memory import free_memory
from transformers_patches.weights.model_files import load_tokenizer, open_weights, read_config

AUTO = "auto"  # spread over all GPUs, and the CPU if those are not enough


@dataclass(frozen=True)
class Estimate:
    """How much memory profiling will take, in bytes."""

    weights: int  # the model's weights
    batch: int  # one batch, and the statistics

    @property
    def total(self) -> int:
        return self.weights + self.batch

    def __str__(self) -> str:
        return f"{_gib(self.total)} (weights {_gib(self.weights)}, one batch and statistics {_gib(self.batch)})"


def estimate_memory(config: PretrainedConfig, dtype: torch.dtype, batch_size: int, tokens: int) -> Estimate:
    """The memory that a run needs with batches of `batch_size` sequences of `tokens` tokens.

    The weights are exact, from the model's shape. A batch is an estimate: hidden states and FFN activations of one
    layer with their float32 copies, keys and values of all layers, the logits of one step, and twice six float64 sums
    per neuron.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    family, layers = family_of(config), config.num_hidden_layers
    experts = family.experts
    size = family.ffn_neurons(config) if experts else family.intermediate_size(config)
    element = torch.empty(0, dtype=dtype).element_size()
    keys = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = (3 * element + 12) * size + 8 * element * config.hidden_size + 2 * element * layers * keys * head
    batch = batch_size * (tokens * per_token + 4 * config.vocab_size) + 2 * 6 * 8 * layers * size
    if experts is not None:  # two sums per neuron instead of six, and one expert's activations
        batch += layers * experts.count * 2 * 2 * 8 * experts.size + batch_size * tokens * 12 * experts.size
    return Estimate(weights, batch)


def choose_placement(
    estimate: Estimate, device: torch.device, free_gpus: list[int], free_cpu: int, processes: int = 1
) -> str:
    """Where the model goes: `cpu`, `cuda:0` (or the named GPU), or AUTO, spread over several devices.

    Only a single process spreads the model. Raises PartInferError, with the estimate, if it fits nowhere.

    free_gpus, free_cpu: free memory in bytes
    processes: how many processes on this machine load the model, each on its own GPU or all in main memory
    """
    if device.type != "cuda":
        if estimate.total * processes > free_cpu:
            free = f"{_gib(free_cpu)} of memory"
            raise PartInferError(_too_large(estimate, free, processes))
        return str(device)
    place = device.index or 0
    if estimate.total <= free_gpus[place]:
        return f"cuda:{place}"
    if processes > 1:
        raise PartInferError(_too_large(estimate, f"{_gib(free_gpus[place])} on GPU {place}", processes))
    if estimate.total <= sum(free_gpus) + free_cpu:
        return AUTO
    free = f"{_gib(sum(free_gpus))} on {len(free_gpus)} GPUs and {_gib(free_cpu)} of memory"
    raise PartInferError(_too_large(estimate, free))


def _too_large(estimate: Estimate, free: str, processes: int = 1) -> str:
    each = f" in each of {processes} processes" if processes > 1 else ""
    fewer = "use fewer processes, " if processes > 1 else ""
    return (
        f"profiling needs about {estimate}{each}, but {free} is free: {fewer}"
        "lower --batch_size or --max_length, use --dtype bfloat16, a larger machine, or a smaller model"
    )


@dataclass
class ProfiledModel:
    """A model and its tokenizer, ready to profile."""

    name: str  # the folder's
    fingerprint: str  # identifies the weights
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_named(arguments: argparse.Namespace) -> ProfiledModel:
    """Load the model that a command's arguments name, with room for its longest texts."""
    return load_for_profiling(
        arguments.checkpoint_path,
        arguments.device,
        arguments.dtype,
        arguments.batch_size,
        arguments.max_length + arguments.max_new_tokens,
    )


def load_for_profiling(
    folder: str | Path, device: str, dtype: str, batch_size: int, tokens: int, processes: int = 1
) -> ProfiledModel:
    """Load a checkpoint folder (or GGUF file) as plain transformers does, once it is known to fit. No network.

    On CPUs, linear layers in 16 bits become FastLinears.

    device: auto, cpu, cuda, or a GPU such as cuda:1
    dtype: auto, or the name of a torch dtype
    batch_size, tokens: the size of the largest batch
    processes: how many processes on this machine load the model
    """
    config = read_config(folder)
    family_of(config)  # refuses an unknown architecture
    _check_length(config, tokens)
    settings = PartInferConfig(method="dense", dtype=dtype, device=device)
    dtype = decide_dtype(settings, config).value
    torch_dtype, where = getattr(torch, dtype), resolve_device(device)
    check_threads(where, torch_dtype)
    gpus = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())] if where.type == "cuda" else []
    estimate = estimate_memory(config, torch_dtype, batch_size, tokens)
    placement = choose_placement(estimate, where, gpus, free_memory(), processes)
    _, mark = checkpoint_fingerprint(folder)  # a clear error if weights are missing
    if is_gguf(folder):
        model = load_model(folder, replace(settings, kernels="torch")).model
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, device_map=placement, local_files_only=True, trust_remote_code=False
        )
        dispatched = any(hasattr(module, "_hf_hook") for module in model.modules())
        if not dispatched and decide_kernels(settings, model.device, dtype).value == "native":
            replace_linears(model)  # faster generation, and faster long texts where PyTorch has no fast 16-bit products
    return ProfiledModel(model_name(folder), mark, model.eval(), load_tokenizer(folder))


def _check_length(config: PretrainedConfig, tokens: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise PartInferError(
            f"--max_length and --max_new_tokens make {tokens} tokens, the model has positions for {longest}: lower them"
        )


def checkpoint_fingerprint(folder: str | Path) -> tuple[PretrainedConfig, str]:
    """Config and fingerprint of a checkpoint folder or GGUF file. Reads four small tensors only."""
    config = read_config(folder)
    checkpoint = open_weights(folder)
    stored = checkpoint.names()

    def read(name: str) -> torch.Tensor:
        name = name if name in stored else name.removeprefix("model.")  # checkpoints of a bare decoder lack the prefix
        if name not in stored:
            raise KeyError(name)
        values = torch.empty(checkpoint.shape(name))
        checkpoint.read_into(name, values)
        return values

    return config, fingerprint(config, read)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
