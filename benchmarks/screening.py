#!/usr/bin/env python3
"""What screening the output projection costs and saves: a model's own hidden states, each product beside the whole head's."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.tables import markdown_table  # noqa: E402
from transformers_patches import kernels  # noqa: E402
from transformers_patches.config import PartInferConfig  # noqa: E402
from transformers_patches.generation.decoding_loop import NUCLEUS_TOLERANCE  # noqa: E402
from transformers_patches.kernels import SOFTMAX, Needed  # noqa: E402
from transformers_patches.load.loader import load_model  # noqa: E402
from transformers_patches.modules.screened_head import ScreenedHead  # noqa: E402
from transformers_patches.weights.lookup import find_model  # noqa: E402
from transformers_patches.weights.memory import WeightMemory  # noqa: E402
from transformers_patches.weights.model_files import load_tokenizer  # noqa: E402

WINDOW, CONTEXT = 512, 128  # tokens that are read together, and those of them that only are context
NEEDED = {
    "the largest (greedy)": Needed(largest=1),
    "the 50 largest (top-k)": Needed(largest=50),
    "softmax, 0.005 nats (top-p)": Needed(tolerance=NUCLEUS_TOLERANCE),
    "softmax, 0.001 nats": SOFTMAX,
}


@dataclass
class Row:
    """One way of screening, over all positions."""

    needed: str  # which logits must be exact
    exact_logits: float  # how many are, per position
    divergence: float  # KL divergence from the exact softmax, in nats
    other_largest: int  # positions with another most likely token
    microseconds: float  # of a screened product
    whole_microseconds: float  # of an exact product


def hidden_states(model, ids: Tensor, positions: int) -> Tensor:
    """What the head gets at `positions` places that are spread over the text: [positions, H]."""
    found = []
    windows = 4 * -(-positions // (WINDOW - CONTEXT))
    for start in tqdm(range(0, len(ids) - WINDOW, WINDOW)[:windows], desc="hidden states", leave=False):
        with torch.inference_mode():
            found.append(model.model(ids[None, start : start + WINDOW]).last_hidden_state[0, CONTEXT:])
    states = torch.cat(found)
    return states[torch.linspace(0, len(states) - 1, positions).long()]


def measure(head: ScreenedHead, whole: kernels.Weight, states: Tensor, name: str) -> Row:
    """Both products of every position, in turn, from memory: what they read is pushed out of the caches in between."""
    other = torch.empty(2**26, dtype=torch.uint8)
    seconds, whole_seconds, exact, divergence, wrong = [], [], [], [], 0
    for x in tqdm(states.split(1), desc=name, leave=False):
        other.add_(1)
        start = time.perf_counter()
        logits, count = kernels.screened_linear(x, head.packed, head.screen, NEEDED[name])
        seconds.append(time.perf_counter() - start)
        other.add_(1)
        start = time.perf_counter()
        expected = kernels.linear(x, whole)
        whole_seconds.append(time.perf_counter() - start)
        p, q = expected.float().log_softmax(-1), logits.float().log_softmax(-1)
        divergence.append(float((p.exp() * (p - q)).sum()))
        exact.append(int(count))
        wrong += int(p.argmax() != q.argmax())
    micro = [1e6 * statistics.median(part) for part in (seconds, whole_seconds)]
    return Row(name, statistics.mean(exact), statistics.mean(divergence), wrong, *micro)


def whole_weight(head: ScreenedHead) -> kernels.Weight:
    """The head's weight as other layers have it, in huge pages."""
    if head.high is not None:
        return head.packed
    data = WeightMemory(huge_pages=True).empty(head.packed.shape, torch.int8, torch.device("cpu"))
    data.copy_(kernels.join_planes(head.packed).data)
    return replace(head.packed, data=data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name", default="smollm2-135m", help="a checkpoint folder, short name or hub id")
    parser.add_argument("--dataset", required=True, help="a text file")
    parser.add_argument("--dtypes", default="int8,bfloat16", help="of the head (int8,bfloat16)")
    parser.add_argument("--positions", type=int, default=300, help="of the text (300)")
    parser.add_argument("--threads", type=int, help="of PyTorch and the kernels")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not kernels.available():
        print(f"error: no native kernels: {kernels.why_not()}", file=sys.stderr)
        return 1
    folder = find_model(options.model_name)
    ids = load_tokenizer(folder)(Path(options.dataset).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    rows = []
    for dtype in options.dtypes.split(","):
        loaded = load_model(folder, PartInferConfig(method="dense", dtype=dtype, device="cpu", screen_head="on"))
        states = hidden_states(loaded.model, ids, options.positions)
        head = loaded.model.get_output_embeddings()
        whole = whole_weight(head)
        rows += [
            {"dtype": dtype, "vocabulary": head.out_features} | asdict(measure(head, whole, states, name))
            for name in NEEDED
        ]
    shown = [
        {
            "head": row["dtype"],
            "what has to be right": row["needed"],
            "exact logits": f"{row['exact_logits']:.0f} of {row['vocabulary']}",
            "divergence": f"{row['divergence']:.5f}",
            "other largest": row["other_largest"],
            "µs": f"{row['microseconds']:.0f}",
            "µs, whole head": f"{row['whole_microseconds']:.0f}",
        }
        for row in rows
    ]
    print(markdown_table(shown, list(shown[0])))
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
