#!/usr/bin/env python3
"""Measure a mixture of experts: random weights in the shapes of Qwen3-30B-A3B, cut to a few layers.

Nothing of the model is downloaded, and nothing is said about quality. Weights are random bytes in the format asked for;
llama.cpp gets a file of random bytes in the same shapes and in Q4_0, which has as many bits as int4. Both are in memory
at the same time, in processes of their own, and take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape
from transformers import AutoConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers_patches import kernels  # noqa: E402
from transformers_patches.config import PartInferConfig  # noqa: E402
from transformers_patches.load.loaded_model import LoadedModel, LoadReport  # noqa: E402
from transformers_patches.load.meta_model import build_model  # noqa: E402
from transformers_patches.modules.fast_linear import replace_linears  # noqa: E402
from transformers_patches.modules.quantized import QuantizedWeight, weight_bytes  # noqa: E402
from transformers_patches.plan.resolve import RunFiles  # noqa: E402
from transformers_patches.plan.run import resolve_run  # noqa: E402
from transformers_patches.sparse.experts import Experts  # noqa: E402
from transformers_patches.sparse.request import RequestState  # noqa: E402

PROMPT, SCALE = 64, 0.004  # tokens; of random weights in few bits
CACHED = (0.25, 0.5, 0.75)  # shares of all experts that a cache holds
TRACE_TOKENS = 4000


def shape(layers: int) -> PretrainedConfig:
    """Qwen3-30B-A3B's config, with fewer layers."""
    return AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def random_model(config: PretrainedConfig, dtype: str, sparsity: float) -> LoadedModel:
    """The model as loading makes it, filled with random bytes."""
    choice = {"selection": "up", "compensation": "none", "loaded_neurons_percent": 1.0, "sparsity": sparsity}
    method = {"method": "dense"} if sparsity == 1 else {"method": "partinfer", "start_num": 0, **choice}
    end = {} if sparsity == 1 else {"end_num": config.num_hidden_layers - 1}
    settings = PartInferConfig(**method, **end, device="cpu", dtype=dtype, kernels="native", screen_head="off")
    run, state = resolve_run(settings, config, RunFiles()), RequestState()
    model, _ = build_model(run, state)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.fill(module.packed.like(lambda like: _random(like, generator)))
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            values = values.fill_(1.0) if parameter.ndim == 1 else values.normal_(0, 0.02, generator=generator)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    state.attach(model)
    replace_linears(model)
    resident = weight_bytes(model)
    return LoadedModel(model, run, state, LoadReport(0.0, resident, resident, resident))


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.dtype.is_floating_point:
        return torch.full(like.shape, SCALE if like.dtype == torch.float16 else 1.0, dtype=like.dtype)
    return torch.randint(0, 256, like.shape, dtype=torch.uint8, generator=generator).view(like.dtype)


class Ours:
    """The model, a token at a time; its experts whole, or with neurons left out, over the same weights."""

    def __init__(self, config: PretrainedConfig, dtype: str, sparsity: float) -> None:
        self.loaded = random_model(config, dtype, sparsity)
        self.mixtures = [module for module in self.loaded.model.modules() if isinstance(module, Experts)]
        self.states = [mixture.state for mixture in self.mixtures]

    def whole(self, tokens: int) -> dict:
        for mixture in self.mixtures:
            mixture.state = None
            mixture.reset()
            for number in range(len(mixture.rows)):
                mixture.moved(number)
            mixture._table = None  # a new one has no sizes
        return self.run(tokens)

    def sparse(self, tokens: int) -> dict:
        for mixture, state in zip(self.mixtures, self.states, strict=True):
            mixture.state = state
        return self.run(tokens)

    @torch.inference_mode()
    def run(self, tokens: int) -> dict:
        """Milliseconds per token, of all of it and of its experts, after a prompt of random ids."""
        ids = torch.randint(0, 1000, (1, PROMPT + tokens), generator=torch.Generator().manual_seed(1))
        self.loaded.reset_counters()
        past = self.loaded.model(ids[:, :PROMPT], use_cache=True).past_key_values
        whole, experts = [], []
        with _timed(self.mixtures, experts):
            for token in ids[0, PROMPT:]:
                started = time.perf_counter()
                past = self.loaded.model(token.view(1, 1), past_key_values=past, use_cache=True).past_key_values
                whole.append(time.perf_counter() - started)
        return {
            "token_ms": statistics.median(whole) * 1e3,
            "experts_ms": statistics.median(experts) * 1e3,
            "bytes": self.loaded.token_bytes(),
        }

    @torch.inference_mode()
    def calls(self, rounds: int) -> dict:
        """Milliseconds for a layer's experts in one call, and expert by expert, in turns over all layers."""
        self.whole(1)
        first, hidden = self.mixtures[0], self.mixtures[0].rows[0].hidden_size
        generator = torch.Generator().manual_seed(2)
        seconds: dict[str, list[float]] = {"one call": [], "one by one": []}
        for _ in range(rounds):
            for mixture in self.mixtures:
                for name, times in seconds.items():
                    x = torch.randn(1, hidden, generator=generator).to(self.loaded.model.dtype)
                    chosen = torch.randperm(len(first.rows), generator=generator)[None, : first.used]
                    own = mixture.native_activation
                    mixture.native_activation = own if name == "one call" else None
                    started = time.perf_counter()
                    mixture(x, chosen, torch.full(chosen.shape, 0.125))
                    times.append(time.perf_counter() - started)
                    mixture.native_activation = own
        read = first.used * first.rows[0].row_bytes
        return {"read": read} | {name: statistics.median(times) * 1e3 for name, times in seconds.items()}


@contextmanager
def _timed(mixtures: list[Experts], seconds: list[float]) -> Iterator[None]:
    """Within this block, add the time of every mixture's call to `seconds`."""
    started: list[float] = []
    before = [m.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())) for m in mixtures]
    after = [m.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - started.pop())) for m in mixtures]
    yield
    for handle in (*before, *after):
        handle.remove()


class LlamaCpp:
    """llama.cpp, a token at a time."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        from evaluation.compared.library import silence

        silence()
        llama_cpp.llama_backend_init()
        self.api = llama_cpp
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 512, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            sys.exit(f"llama.cpp can't run {path}")

    def whole(self, tokens: int) -> dict:
        ids = torch.randint(0, 1000, (PROMPT + tokens,), generator=torch.Generator().manual_seed(1)).tolist()
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        seconds = []
        for part in (ids[:PROMPT], *([token] for token in ids[PROMPT:])):
            values = (self.api.llama_token * len(part))(*part)
            started = time.perf_counter()
            if self.api.llama_decode(self.context, self.api.llama_batch_get_one(values, len(part))):
                sys.exit("llama.cpp failed to decode")
            seconds.append(time.perf_counter() - started)
        return {"token_ms": statistics.median(seconds[1:]) * 1e3}


def write_random_gguf(path: Path, config: PretrainedConfig) -> None:
    """A file of random Q4_0 blocks in the model's shapes, without a vocabulary."""
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    hidden, head, size = config.hidden_size, config.head_dim, config.moe_intermediate_size
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    matrices = {"token_embd": (config.vocab_size, hidden), "output": (config.vocab_size, hidden)}
    vectors = {"output_norm": (hidden,)}
    for layer in range(config.num_hidden_layers):
        place = f"blk.{layer}."
        matrices |= {
            f"{place}attn_q": (queries, hidden),
            f"{place}attn_k": (keys, hidden),
            f"{place}attn_v": (keys, hidden),
        }
        matrices |= {
            f"{place}attn_output": (hidden, queries),
            f"{place}ffn_down_exps": (config.num_experts, hidden, size),
        }
        matrices |= {f"{place}ffn_{name}_exps": (config.num_experts, size, hidden) for name in ("gate", "up")}
        vectors |= {f"{place}{name}_norm": (hidden,) for name in ("attn", "ffn")}
        vectors |= {f"{place}attn_{name}_norm": (head,) for name in ("q", "k")}
        vectors[f"{place}ffn_gate_inp"] = (config.num_experts, hidden)
    kind, random = GGMLQuantizationType.Q4_0, np.random.default_rng(0)
    for name, dims in matrices.items():
        packed = quant_shape_to_byte_shape(dims, kind)
        writer.add_tensor_info(f"{name}.weight", packed, np.dtype(np.uint8), int(np.prod(packed)), kind)
    for name, dims in vectors.items():
        writer.add_tensor_info(f"{name}.weight", dims, np.dtype(np.float32), 4 * int(np.prod(dims)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for dims in matrices.values():
        blocks = random.integers(0, 256, (int(np.prod(dims)) // 32, 18), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(SCALE).tobytes(), dtype=np.uint8)
        writer.write_tensor_data(blocks.reshape(quant_shape_to_byte_shape(dims, kind)))
    for dims in vectors.values():
        values = np.ones(dims) if len(dims) == 1 else random.normal(0, 0.02, dims)
        writer.write_tensor_data(values.astype(np.float32))
    writer.close()


def hit_rate(skewed: bool, experts: int, used: int, room: int) -> float:
    """How many of a layer's expert uses a cache of the last used ones answers, for a synthetic trace of a router.

    even: every token's experts are drawn alike. skewed: with the probabilities of Zipf's law (1 / rank), and half of a
    token's experts are the last token's.
    """
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, experts + 1) if skewed else np.ones(experts)
    chances = random.permutation(weights / weights.sum())
    cache: OrderedDict[int, None] = OrderedDict()
    last, hits, uses = [], 0, 0
    for token in range(TRACE_TOKENS):
        kept = list(random.permutation(last)[: used // 2]) if skewed and token else []
        others = chances.copy()
        others[kept] = 0
        last = [*kept, *random.choice(experts, used - len(kept), replace=False, p=others / others.sum())]
        for expert in last:
            if token >= TRACE_TOKENS // 4:  # when the cache is full
                hits, uses = hits + (expert in cache), uses + 1
            cache[expert] = None
            cache.move_to_end(expert)
            if len(cache) > room:
                cache.popitem(last=False)
    return hits / uses


class Worker:
    """An engine in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, __file__, "--worker", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a worker ended early: see above")
        return json.loads(line)

    def ask(self, command: str, number: int) -> dict:
        print(command, number, file=self.process.stdin, flush=True)
        return self.answer()


def work(engine: Ours | LlamaCpp) -> None:
    """Answer commands from standard input."""
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        command, number = line.split()
        print(json.dumps(getattr(engine, command)(int(number))), flush=True)


def measure(options: argparse.Namespace, config: PretrainedConfig, folder: Path) -> dict:
    common = ["--layers", str(options.layers), "--threads", str(options.threads), "--dtype", options.dtype]
    ours = Worker(*common, "--sparsity", str(options.sparsity))
    subjects = {"dense": (ours, "whole")}
    if options.sparsity < 1:
        subjects[f"neurons {options.sparsity:g}"] = (ours, "sparse")
    if options.llama_cpp:
        path = folder / "model.gguf"
        write_random_gguf(path, config)
        subjects["llama.cpp Q4_0"] = (Worker(*common, "--gguf", str(path)), "whole")
    rounds: dict[str, list[dict]] = {name: [] for name in subjects}
    for _ in range(options.rounds):
        for name, (worker, command) in subjects.items():
            rounds[name].append(worker.ask(command, options.tokens))
    medians = {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]} for name, found in rounds.items()
    }
    calls = ours.ask("calls", 5)
    probe = kernels.bandwidth_probe()
    for worker in {worker for worker, _ in subjects.values()}:
        worker.process.stdin.close()
        worker.process.wait()
    return {"models": medians, "calls": calls, "probe": probe}


def show(found: dict, config: PretrainedConfig) -> None:
    size, hidden, used = config.moe_intermediate_size, config.hidden_size, config.num_experts_per_tok
    print(
        f"probe {found['probe'] / 1e9:.1f} GB/s\n\n| | ms per token | ms of a layer's experts | MB per token |\n|---|---|---|---|"
    )
    for name, row in found["models"].items():
        experts = f"{row['experts_ms']:.3f}" if "experts_ms" in row else ""
        read = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""
        print(f"| {name} | {row['token_ms']:.2f} | {experts} | {read} |")
    calls = found["calls"]
    print(f"\nA layer's experts read {calls['read'] / 1e6:.2f} MB: {used} experts of 3 x {size} rows of {hidden}.")
    for name in ("one call", "one by one"):
        rate = calls["read"] / calls[name] * 1e-6
        print(f"{name}: {calls[name]:.3f} ms, {rate:.1f} GB/s, {rate * 1e9 / found['probe']:.0%} of the probe")
    print(
        "\n| experts in the cache | "
        + " | ".join(f"{share:.0%}" for share in CACHED)
        + " |\n|---|"
        + "---|" * len(CACHED)
    )
    for name, skewed in (("even trace (synthetic)", False), ("skewed trace (synthetic)", True)):
        rates = [hit_rate(skewed, config.num_experts, used, round(share * config.num_experts)) for share in CACHED]
        print(f"| {name} | " + " | ".join(f"{rate:.0%}" for rate in rates) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=["int4", "int8"], default="int4")
    parser.add_argument("--sparsity", type=float, default=1.0, help="also with so much of each expert's bytes read")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each round")
    parser.add_argument("--llama_cpp", action="store_true", help="beside llama.cpp (needs llama-cpp-python)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gguf", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = shape(options.layers)
    if options.worker:
        work(LlamaCpp(options.gguf, options.threads) if options.gguf else Ours(config, options.dtype, options.sparsity))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, config, Path(folder))
    print(json.dumps(found)) if options.json else show(found, config)


if __name__ == "__main__":
    main()
