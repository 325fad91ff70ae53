#!/usr/bin/env python3
"""Which rule for what stays in memory finds most rows, and whether the next layer's rows can be asked for early.

The dense model answers prompts of several kinds. Which neurons each token of an answer would choose by `up` is noted for every
layer, and every rule then sees the same choices, layer by layer and token by token, with the same room. In the beginning the
rows are there that the first half of the prompts chose most often; what is reported comes from the second half.

"the best possible" knows the future and keeps what is needed again soonest (Belady, 1966). "forecast" is another question: of
the rows that a layer chooses, how many the same number of best rows has, if the layer before chooses them from its own
input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.memory.runs import prompts_of  # noqa: E402
from transformers_patches import cli, flags  # noqa: E402
from transformers_patches.config import neuron_count  # noqa: E402
from transformers_patches.errors import PartInferError  # noqa: E402
from transformers_patches.families import family_of  # noqa: E402
from transformers_patches.plan.load_plan import kept_count  # noqa: E402
from transformers_patches.weights.lookup import find_model  # noqa: E402

FADING = 0.98  # of a choice, per token
NEVER = 1 << 30
GATED = 3  # matrices of a gated FFN


@dataclass
class Trace:
    """What the tokens of all answers chose, and what the layer before would have forecast."""

    chosen: list[list[Tensor]] = field(default_factory=list)  # per prompt and layer: bool [T, N]
    recall: list[float] = field(default_factory=list)  # per prompt: of the chosen, mean over all layers but the first


class Watched:
    """The inputs of every FFN and of the norm before it, while a model reads a text."""

    def __init__(self, model: nn.Module) -> None:
        family = family_of(model.config)
        self.layers = family.decoder_layers(model)
        lacking = [name for name in ("post_attention_layernorm", "mlp") if not hasattr(self.layers[0], name)]
        if lacking or not all(hasattr(self.layers[0].mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
            raise PartInferError(
                f"{model.config.model_type}: expected layers of Llama's kind (post_attention_layernorm and a gated mlp)"
            )
        self.model = model
        self.before_norm: list[Tensor] = []
        self.norms = [layer.mlp.down_proj.weight.float().norm(dim=0) for layer in self.layers]

    def read(self, ids: Tensor) -> None:
        self.before_norm = []
        hooks = [
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args: self.before_norm.append(args[0][0])
            )
            for layer in self.layers
        ]
        try:
            self.model(ids, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()

    def scores(self, layer: int, hidden: Tensor, prompt: int) -> Tensor:
        """What `up` says about each neuron of a layer: |up x| rms(act(gate x)) ||W_down||, of the answer's tokens.

        hidden: [T, H], before the layer's norm. prompt: how many tokens come before the answer; they give the rms.
        """
        ffn, norm = self.layers[layer].mlp, self.layers[layer].post_attention_layernorm
        known = norm(self.before_norm[layer][:prompt])
        typical = ffn.act_fn(ffn.gate_proj(known)).float().square().mean(0).sqrt()
        return ffn.up_proj(norm(hidden[prompt:])).float().abs() * typical * self.norms[layer]


def best(scores: Tensor, count: int) -> Tensor:
    """bool like scores: the `count` largest of each row."""
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, scores.topk(count, sorted=False).indices, True)


@torch.inference_mode()
def traced(folder: Path, prompts: list[list[int]], tokens: int, sparsity: float) -> Trace:
    """The choices of `tokens` tokens after each prompt. sparsity: share of the FFN's bytes that a token reads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    watched, trace = Watched(model), Trace()
    for prompt in tqdm(prompts, desc="answers", leave=False):
        ids = torch.tensor([prompt])
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        watched.read(ids)
        size, found, recalls = watched.norms[0].numel(), [], []
        count = kept_count(sparsity, size, size, GATED)
        for layer, hidden in enumerate(watched.before_norm):
            found.append(best(watched.scores(layer, hidden, len(prompt)), count))
            if layer:
                forecast = best(watched.scores(layer, watched.before_norm[layer - 1], len(prompt)), count)
                recalls.append(float((forecast & found[-1]).sum() / found[-1].sum()))
        trace.chosen.append(found)
        trace.recall.append(sum(recalls) / len(recalls))
    return trace


# choices [T, N] and first counts [N] -> what rows are worth [N] after a token
Rule = Callable[[Tensor, Tensor], Callable[[int], Tensor]]


def least_recently_used(chosen: Tensor, first: Tensor) -> Callable[[int], Tensor]:
    last = first / (1 + first.max()) - 1  # before any token, in the order of the counts

    def worth(token: int) -> Tensor:
        last[chosen[token]] = token
        return last

    return worth


def least_often_used(chosen: Tensor, first: Tensor) -> Callable[[int], Tensor]:
    counts = first.clone()

    def worth(token: int) -> Tensor:
        return counts.add_(chosen[token])

    return worth


def fading(chosen: Tensor, first: Tensor) -> Callable[[int], Tensor]:
    """Each choice counts less with every token that follows (LRFU, Lee et al., 2001)."""
    counts = first / first.max().clamp(min=1) / 2 / (1 - FADING)

    def worth(token: int) -> Tensor:
        return counts.mul_(FADING).add_(chosen[token])

    return worth


def best_possible(chosen: Tensor, first: Tensor) -> Callable[[int], Tensor]:
    next_use = torch.full(chosen.shape, NEVER, dtype=torch.int64)
    for token in range(len(chosen) - 2, -1, -1):
        next_use[token] = torch.where(chosen[token + 1], token + 1, next_use[token + 1])
    return lambda token: -next_use[token]


RULES: dict[str, Rule | None] = {
    "never changed": None,
    "least recently used": least_recently_used,
    "least often used": least_often_used,
    "fading counts": fading,
    "the best possible": best_possible,
}


def hit_rate(chosen: Tensor, first: Tensor, room: int, rule: Rule | None) -> float:
    """Of the chosen rows, how many were in memory. chosen: bool [T, N]; first: how often each was chosen before, [N]."""
    held = torch.zeros(len(first), dtype=torch.bool)
    held[first.topk(room).indices] = True
    worth, hits = rule and rule(chosen, first), 0
    for token, rows in enumerate(chosen):
        hits += int((rows & held).sum())
        if worth is None:
            continue
        candidates = (held | rows).nonzero().squeeze(1)
        keep = candidates[worth(token)[candidates].topk(room).indices]
        held.zero_()
        held[keep] = True
    return hits / int(chosen.sum())


def rows_of(trace: Trace, rooms: list[float]) -> list[dict]:
    """Hit rates of every rule for shares of the rows in memory: means over the layers, as they choose equally many."""
    half, layers = len(trace.chosen) // 2, len(trace.chosen[0])
    first = [torch.cat(found).sum(0).float() for found in zip(*trace.chosen[:half], strict=True)]
    tested = [torch.cat(found) for found in zip(*trace.chosen[half:], strict=True)]
    table = [{"rule": name} for name in RULES]
    bar = tqdm(total=len(rooms) * len(RULES) * layers, desc="rules", leave=False)
    for room in rooms:
        for row, rule in zip(table, RULES.values(), strict=True):
            rates = []
            for counts, chosen in zip(first, tested, strict=True):
                rates.append(hit_rate(chosen, counts, neuron_count(room, len(counts)), rule))
                bar.update()
            row[f"{room:.0%} of the rows"] = sum(rates) / layers
    bar.close()
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help)
    parser.add_argument("--model_name", default="smollm2-135m", help="of Llama's kind (smollm2-135m)")
    parser.add_argument("--prompts", type=int, default=8, help="of different kinds, at least 2 (8)")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (64)")
    parser.add_argument("--sparsity", type=float, default=0.7, help="share of the FFN's bytes that a token reads (0.7)")
    flags.add_json(parser)
    arguments = flags.parse(parser, argv)
    if arguments.prompts < 2:
        raise PartInferError(
            f"half of the prompts say what is there at first: expected 2 or more, got {arguments.prompts}"
        )
    folder = find_model(arguments.model_name)
    trace = traced(folder, prompts_of(folder, arguments.prompts, 64), arguments.tokens, arguments.sparsity)
    rows = rows_of(trace, [0.1, 0.2, 0.4, 0.6])
    recall = sum(trace.recall) / len(trace.recall)
    shown = [list(rows[0])]
    shown += [[row["rule"], *(f"{value:.1%}" for name, value in row.items() if name != "rule")] for row in rows]
    text = f"{cli.aligned(shown)}\nforecast by the layer before: {recall:.1%} of the chosen rows"
    cli.report(arguments.json, {"rows": rows, "forecast": recall}, text)
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
