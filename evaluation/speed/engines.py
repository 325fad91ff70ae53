"""The engines that use PyTorch: PartInfer as its scripts run it, and plain transformers."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel

from evaluation.methods import METHODS
from evaluation.models import load_configuration
from evaluation.speed.job import Job, Stopwatch, Timing
from evaluation.speed.random_weights import RandomWeights, shape_config
from evaluation.weights import weight_counts
from transformers_patches.families import family_of
from transformers_patches.generation.generate import generate_ids
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_from
from transformers_patches.load.meta_model import build_on_meta
from transformers_patches.neurons.random_ranking import random_ranking
from transformers_patches.plan.machine import resolve_device
from transformers_patches.plan.resolve import RunFiles

DEFAULT, BEST = "transformers (default)", "transformers (best)"
TUNING_TOKENS = 8


def greedy(new_tokens: int) -> GenerationConfig:
    """Settings that generate exactly `new_tokens` tokens, greedily."""
    return GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=None)


class PartInferEngine:
    """A configuration of this project."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.variants = [job.label]
        self.loaded = _load(job)
        self.load_s = self.loaded.report.seconds
        self._selection = _SelectionClock(self.loaded)
        self._selection_seconds: list[float] = []  # of each run since the facts were asked for

    def run(self, variant: str, prompts: list[list[int]], new_tokens: int) -> Timing:
        watch = Stopwatch()
        self._selection.seconds = 0.0
        generate_ids(self.loaded, torch.tensor(prompts, device=self.loaded.device), greedy(new_tokens), watch)
        self._selection_seconds.append(self._selection.seconds)
        return watch.timing()

    def facts(self, variant: str) -> dict:
        counts, plan = weight_counts(self.loaded), self.loaded.plan
        settings = self.loaded.settings
        steps = counts["decoded_tokens"] * max(1, len(self.loaded.state.layers))
        self.loaded.reset_counters()
        selection, self._selection_seconds = statistics.median(self._selection_seconds or [0.0]), []
        return {
            "selection_s": selection,
            "sparsity": settings.sparsity if settings.computes_sparsely else None,
            "loaded_neurons_percent": plan.loaded_fraction,
            "computed_neurons_percent": counts["ffn_bytes_fraction"],
            "neurons_per_layer_and_token": counts["computed_neurons"] / steps if steps else plan.intermediate_size,
            "sparse_layers": len(plan.layers),
            "weight_bytes_resident": counts["weight_bytes_resident"],
            "weight_bytes_per_token": counts["token_bytes"],
        }


class _SelectionClock:
    """Measures the seconds that layers spend on a prompt's evidence and on choosing neurons by it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.seconds = 0.0
        for layer in loaded.state.layers:
            layer.observe = self._timed(layer.observe)

    def _timed(self, observe: Callable) -> Callable:
        def timed(*arguments) -> None:
            started = time.perf_counter()
            observe(*arguments)
            self.seconds += time.perf_counter() - started

        return timed


def _load(job: Job) -> LoadedModel:
    if job.folder is not None:
        options = argparse.Namespace(
            task_type=job.task_type, random_neurons_filepath=job.random_neurons_filepath, seed=job.seed
        )
        return load_configuration(job.configuration, job.folder, options)
    config, settings = shape_config(job.shape), job.configuration.settings
    ranking = None
    if settings.needs_neuron_files:
        seed = job.seed + METHODS[job.configuration.method].random  # a ranking of its own, although all are random here
        ranking = random_ranking(config.num_hidden_layers, family_of(config).intermediate_size(config), seed)
    weights = RandomWeights(config, getattr(torch, job.float_dtype), job.seed)
    return load_from(weights, config, settings, RunFiles.of(settings, ranking, ranking), job.shape)


class TransformersEngine:
    """The model as transformers itself loads and runs it, once with its defaults and once with its best settings.

    The best settings may turn oneDNN off in decoding: on some CPUs PyTorch's own matrix products are faster.
    """

    variants = [DEFAULT, BEST]

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        started = time.perf_counter()
        device, dtype = resolve_device(job.device), getattr(torch, job.float_dtype)
        if job.folder is not None:
            model = AutoModelForCausalLM.from_pretrained(
                job.folder, dtype=dtype, local_files_only=True, trust_remote_code=False
            )
        else:
            model = _random_model(job.shape, dtype, job.seed)
        self.model = model.to(device).eval()
        self.load_s = time.perf_counter() - started
        self._best_without_onednn: bool | None = None

    def run(self, variant: str, prompts: list[list[int]], new_tokens: int) -> Timing:
        if variant == DEFAULT:
            return self._generate(prompts, new_tokens, without_onednn=False)
        if self._best_without_onednn is None:
            with_, without = (
                max(self._generate(prompts, TUNING_TOKENS, without_onednn=off).decode_steps_per_second for _ in "12")
                for off in (False, True)
            )
            self._best_without_onednn = without > with_
        return self._generate(prompts, new_tokens, without_onednn=self._best_without_onednn)

    def _generate(self, prompts: list[list[int]], new_tokens: int, *, without_onednn: bool) -> Timing:
        ids = torch.tensor(prompts, device=self.model.device)
        watch = _WithoutOneDnn() if without_onednn else Stopwatch()
        try:
            with torch.inference_mode():
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=DynamicCache(),
                    generation_config=greedy(new_tokens),
                    streamer=watch,
                )
        finally:
            torch.backends.mkldnn.set_flags(True)
        return watch.timing()

    def facts(self, variant: str) -> dict:
        resident = sum(p.numel() * p.element_size() for p in self.model.parameters())
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        untied = 0 if head is embedding else embedding.numel() * embedding.element_size()
        size = family_of(self.model.config).intermediate_size(self.model.config)
        return {
            "sparsity": None,
            "loaded_neurons_percent": 1.0,
            "computed_neurons_percent": 1.0,
            "neurons_per_layer_and_token": size,
            "sparse_layers": 0,
            "weight_bytes_resident": resident,
            "weight_bytes_per_token": resident - untied,
            "settings": "defaults" if variant == DEFAULT else _settings_text(self._best_without_onednn),
        }


def _settings_text(without_onednn: bool | None) -> str:
    return "oneDNN off in decoding" if without_onednn else "defaults (oneDNN off in decoding was slower)"


class _WithoutOneDnn(Stopwatch):
    """Switches oneDNN off after the first token, since prefill needs it."""

    def put(self, value) -> None:
        super().put(value)
        if self.seconds:
            torch.backends.mkldnn.set_flags(False)


def _random_model(shape: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """The plain transformers model of a shape, with the same random weights as the other engines."""
    config = shape_config(shape)
    model, weights = build_on_meta(config, dtype), RandomWeights(config, dtype, seed)
    names = weights.names()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in names:
            values = torch.empty(parameter.shape, dtype=dtype)
            weights.read_into(name, values)
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model
