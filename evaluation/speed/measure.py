"""Measures models in turn, each in its own process, round after round, with a bandwidth probe in every round."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PretrainedConfig

from evaluation.compared.files import ComparedFiles
from evaluation.compared.kinds import SAME_BITS
from evaluation.methods import Configuration
from evaluation.models import model_label, settled
from evaluation.speed.job import Job, Timing
from evaluation.speed.random_weights import RandomWeights, shape_config
from evaluation.speed.rows import measured_row, speedup
from evaluation.speed.workers import Worker
from transformers_patches import kernels
from transformers_patches.config import QUANTIZED_DTYPES
from transformers_patches.errors import PartInferError
from transformers_patches.flags import IGNORED_GGUF_KEYS
from transformers_patches.load.meta_model import build_on_meta
from transformers_patches.plan.machine import resolve_device
from transformers_patches.token_ids import check_token_ids
from transformers_patches.weights.file_kinds import is_pack
from transformers_patches.weights.lookup import find_model
from transformers_patches.weights.memory import free_memory
from transformers_patches.weights.model_files import load_tokenizer, open_weights, read_config
from transformers_patches.weights.pack_description import pack_type

MEMORY_BESIDE_WEIGHTS = 600 * 2**20  # of each process, for PyTorch, the cache and activations


class Measurement:
    """A measurement as the arguments describe it; `conditions` says under which conditions.

    Raises PartInferError if there is no such model, if the prompt is empty or too long, or if memory is short.

    scratch: a folder for GGUF files
    files: those files, if they are shared with others
    """

    def __init__(self, arguments: argparse.Namespace, scratch: Path, files: ComparedFiles | None = None) -> None:
        self.arguments, self.scratch, self.files = arguments, scratch, files
        self.folder = None
        if not arguments.random_weights:
            self.folder = find_model(arguments.model_name, arguments.checkpoint_path)
        self.config = read_config(self.folder) if self.folder else shape_config(arguments.random_weights)
        self.device = resolve_device(arguments.device or "auto")
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        self.prompts = self._prompts()
        self.conditions = {
            "model": model_label(self.folder) if self.folder else arguments.random_weights,
            "random_weights": self.folder is None,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "batch_size": len(self.prompts),
            "prompt_length": len(self.prompts[0]),
            "new_tokens": arguments.num_tokens_to_generate,
            "repetitions": arguments.repetitions,
            "kernels": kernels.variant(),
        }

    def _prompts(self) -> list[list[int]]:
        """The prompts, all of one length: --prompt, or random tokens."""
        arguments = self.arguments
        if arguments.prompt is not None:
            tokens = load_tokenizer(self.folder).encode(arguments.prompt)
            if not tokens:
                raise PartInferError("the prompt has no tokens: give a text with --prompt")
            check_token_ids(tokens, self.config.vocab_size)
            prompts = [tokens] * arguments.batch_size
        else:
            generator = torch.Generator().manual_seed(arguments.seed)
            shape = (arguments.batch_size, arguments.prompt_length)
            prompts = torch.randint(self.config.vocab_size, shape, generator=generator).tolist()
        limit = self.config.max_position_embeddings
        if len(prompts[0]) + arguments.num_tokens_to_generate > limit:
            raise PartInferError(
                f"{len(prompts[0])} prompt tokens and {arguments.num_tokens_to_generate} generated ones exceed the "
                f"model's {limit}: shorten one of them"
            )
        return prompts

    def rows(self, grid: list[Configuration], with_transformers: bool, compared: list[str | None]) -> list[dict]:
        """A row for each configuration, two for transformers, and one for each type of llama.cpp's weights."""
        if self.folder is not None:
            grid = [settled(configuration, self.folder, self.arguments.task_type) for configuration in grid]
        jobs = [self._job("partinfer", p.label, self._dtype(p.settings.dtype), configuration=p) for p in grid]
        if with_transformers:
            jobs.append(self._job("transformers", "transformers", self._float_dtype()))
        jobs += self._llama_cpp_jobs(compared)
        with _workers(jobs) as workers:
            subjects = [(worker, variant) for worker in workers for variant in worker.variants]
            timings, probe = self._measure(subjects)
            self.conditions["probe_gigabytes_per_second"] = probe / 1e9
            return [
                self._row(worker, variant, mine, timings, probe)
                for (worker, variant), mine in zip(subjects, timings.values(), strict=True)
            ]

    def _job(self, engine: str, label: str, dtype: str, **options) -> Job:
        arguments = self.arguments
        return Job(
            engine,
            label,
            dtype,
            self._float_dtype(),
            self.folder,
            arguments.random_weights,
            self.conditions["threads"],
            str(self.device),
            arguments.seed,
            frozenset(IGNORED_GGUF_KEYS),
            task_type=arguments.task_type,
            random_neurons_filepath=arguments.random_neurons_filepath,
            **options,
        )

    def _dtype(self, given: str) -> str:
        if given == "auto" and self.folder is not None and is_pack(self.folder):
            return pack_type(self.folder)
        return str(self.config.dtype or torch.float32).removeprefix("torch.") if given == "auto" else given

    def _float_dtype(self) -> str:
        """The type of the weights that are not quantised."""
        given = self.arguments.dtype or "auto"
        own = self._dtype("auto" if given in QUANTIZED_DTYPES else given)
        return "bfloat16" if own in QUANTIZED_DTYPES else own

    def _llama_cpp_jobs(self, compared: list[str | None]) -> list[Job]:
        if not compared:
            return []
        if self.files is None:
            self.files = ComparedFiles(
                self.folder,
                lambda: open_weights(self.folder) if self.folder else self._random_weights(),
                self.config,
                self._float_dtype(),
                self.scratch,
            )
        own = self._dtype(self.arguments.dtype or "auto")
        files = [self.files.file(kind or SAME_BITS.get(own, own)) for kind in compared]
        return [self._job("llama.cpp", file.label, file.kind, compared=file) for file in files]

    def _random_weights(self) -> RandomWeights:
        return RandomWeights(self.config, getattr(torch, self._float_dtype()), self.arguments.seed)

    def _measure(self, subjects: list[tuple[Worker, str]]) -> tuple[dict[str, list[Timing]], float]:
        """Timings by label, one for each round, and the median of the rounds' bandwidth probes in bytes per second."""
        arguments = self.arguments
        timings: dict[str, list[Timing]] = {variant: [] for _, variant in subjects}
        probes = []
        for turn in tqdm(range(-arguments.warmup, arguments.repetitions), desc="rounds", leave=False):
            if turn == 0:
                for worker, variant in subjects:
                    worker.facts(variant)  # resets the counters before the measured rounds
            probes.append(self._probe())
            for worker, variant in subjects:
                timing = worker.run(variant, self.prompts, arguments.num_tokens_to_generate)
                if turn >= 0:
                    timings[variant].append(timing)
        return timings, statistics.median(probes[arguments.warmup :])

    def _probe(self) -> float:
        """The bandwidth of the device's memory, in bytes per second."""
        if self.device.type == "cpu":
            return kernels.bandwidth_probe(repetitions=3)
        buffer = torch.ones(2**28, device=self.device)
        seconds = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
            start.record()
            buffer.sum()
            end.record()
            torch.cuda.synchronize(self.device)
            seconds.append(start.elapsed_time(end) / 1e3)
        return buffer.nbytes / min(seconds)

    def _dense(self, timings: dict[str, list[Timing]]) -> list[Timing] | None:
        """The timings of this project's first dense model, which the others are compared to."""
        return next((mine for label, mine in timings.items() if label.partition(" ")[0] == "dense"), None)

    def _row(
        self, worker: Worker, variant: str, mine: list[Timing], timings: dict[str, list[Timing]], probe: float
    ) -> dict:
        configuration, job = worker.job.configuration, worker.job
        conditions = self.conditions
        names = ("model", "batch_size", "prompt_length", "new_tokens", "repetitions", "threads")
        return {
            "label": variant,
            "method": configuration.method if configuration else job.engine,
            "dtype": job.dtype,
            **measured_row(mine, worker.facts(variant), probe, len(self.prompts), conditions["prompt_length"]),
            "speedup_over_dense": speedup(mine, self._dense(timings)),
            **{name: conditions[name] for name in names},
        }


@contextmanager
def _workers(jobs: list[Job]) -> Iterator[list[Worker]]:
    """A loaded worker for each job. All of them end with the block."""
    workers: list[Worker] = []
    try:
        for job in tqdm(jobs, desc="loading", leave=False):
            _check_memory(job, len(workers))
            workers.append(Worker(job))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _check_memory(job: Job, loaded: int) -> None:
    """Raise PartInferError if the model does not fit into free memory: swapping would be measured instead."""
    if job.device != "cpu":
        return
    if job.compared is not None:
        needed = os.path.getsize(job.compared.path)
    else:
        needed = _weight_bytes(read_config(job.folder) if job.folder else shape_config(job.shape), job.float_dtype)
    free = free_memory()
    if needed + MEMORY_BESIDE_WEIGHTS > free:
        raise PartInferError(
            f"{job.label} takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free with {loaded} models loaded: "
            "measure fewer at a time"
        )


def _weight_bytes(config: PretrainedConfig, dtype: str) -> int:
    model = build_on_meta(config, getattr(torch, dtype))
    return sum(p.numel() * p.element_size() for p in model.parameters())
