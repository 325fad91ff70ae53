"""Negative log-likelihood, KL divergence and top-1 agreement of several methods on the same examples."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from evaluation.bootstrap import Bootstrap
from evaluation.scoring import batches, continuation_logits, decoded_logits
from evaluation.windows import Example
from transformers_patches.errors import PartInferError
from transformers_patches.files import scratch_folder
from transformers_patches.token_ids import check_finite, check_token_ids

COLUMNS = ("nll", "tokens", "kl", "agreement")
_BLOCK = 16  # tokens whose float32 distributions are in memory at a time


class DenseLogits:
    """The dense model's logits of every example, as files in a temporary folder, in the type they were computed in.

    With files, only one model is in memory at a time, however many examples there are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check_space(self, examples: list[Example], vocabulary: int, bytes_each: int) -> None:
        """Raise PartInferError if the folder's disk has no room for the logits of all examples."""
        needed = sum(len(example.target) for example in examples) * vocabulary * bytes_each
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise PartInferError(
                f"the dense model's logits take {needed / 1e9:.1f} GB, {self.folder} has {free / 1e9:.1f} GB free: "
                "give a smaller --limit, or set TMPDIR to a larger disk"
            )

    def save(self, index: int, logits: torch.Tensor) -> None:
        save_file({"logits": logits.cpu().contiguous()}, self.folder / f"{index}.safetensors")

    def load(self, index: int, device: torch.device) -> torch.Tensor:
        return load_file(self.folder / f"{index}.safetensors")["logits"].to(device)


@contextmanager
def dense_logits() -> Iterator[DenseLogits]:
    """A temporary place for the dense model's logits."""
    with scratch_folder("dense") as folder:
        yield DenseLogits(folder)


def score_examples(
    logits: Iterable[tuple[int, torch.Tensor]], examples: list[Example], dense: DenseLogits | None, *, is_dense: bool
) -> dict[str, np.ndarray]:
    """Sums over each example's scored tokens: float64 [examples] for each name in COLUMNS; NaN without logits.

    logits: for each example, its index and the logits [T, V] of its target
    dense: the dense model's logits, written if is_dense, else read; None: `kl` and `agreement` are NaN
    """
    table = {name: np.full(len(examples), np.nan) for name in COLUMNS}
    with tqdm(total=len(examples), desc="Scoring", leave=False) as progress:
        for index, own in logits:
            if is_dense and dense is not None:
                dense.save(index, own)
            reference = None if dense is None else dense.load(index, own.device)
            for name, value in _sums(own, examples[index].target, reference).items():
                table[name][index] = value
            progress.update()
    return table


def method_logits(
    model: PreTrainedModel, examples: list[Example], batch_size: int | None, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, torch.Tensor]]:
    """For each example, its index and the logits [T, V] of its target.

    batch_size: how many examples to score together, in one pass; None: one example at a time, token by token, as
        decoding computes
    share: of several processes, which one this is and how many there are; each takes whole batches, so that what is
        computed together does not depend on them

    Raises PartInferError for tokens that the model does not have.
    """
    for number, example in enumerate(examples, start=1):
        check_token_ids(example.context + example.target, model.config.vocab_size, f"example {number}")
    if batch_size is None:
        for index, example in list(enumerate(examples))[share[0] :: share[1]]:
            yield index, decoded_logits(model, example.context, example.target)
        return
    requests = [(example.context, [example.target]) for example in examples]
    for indices in list(batches(requests, batch_size))[share[0] :: share[1]]:
        for row, _, logits in continuation_logits(model, [requests[i] for i in indices]):
            yield indices[row], logits


def together(tables: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The table of all examples from those of several processes, which are NaN where another one has the example."""
    whole = {name: values.copy() for name, values in tables[0].items()}
    for table in tables[1:]:
        theirs = ~np.isnan(table["nll"])
        for name, values in table.items():
            whole[name][theirs] = values[theirs]
    return whole


def _sums(logits: torch.Tensor, target: list[int], dense: torch.Tensor | None) -> dict[str, float]:
    """Sums over the target's tokens; PartInferError for logits that are not finite.

    logits, dense: [T, V]. KL(dense || method) as in Kullback and Leibler 1951, in nats.
    """
    check_finite(logits)
    sums = {"nll": 0.0, "tokens": float(len(target))} | ({} if dense is None else {"kl": 0.0, "agreement": 0.0})
    for start in range(0, len(target), _BLOCK):
        block = slice(start, start + _BLOCK)
        log_probs = torch.log_softmax(logits[block].float(), dim=-1)
        own = log_probs.gather(1, torch.tensor(target[block], device=logits.device)[:, None])
        sums["nll"] -= float(own.double().sum())
        if dense is not None:
            expected = torch.log_softmax(dense[block].float(), dim=-1)
            sums["kl"] += float((expected.exp() * (expected - log_probs)).sum(dtype=torch.float64))
            sums["agreement"] += float((dense[block].argmax(-1) == logits[block].argmax(-1)).sum())
    return sums


def result_row(
    what: dict,
    table: dict[str, np.ndarray],
    dense: dict[str, np.ndarray] | None,
    same: dict[str, np.ndarray] | None,
    bootstrap: Bootstrap,
) -> dict:
    """One row of the result: means per scored token, each with its 95 % interval as `<name>_ci`.

    what: the row's label, settings and weights
    dense: the dense model's table
    same: the table of the same settings in the first type of weights, for perplexity_ratio
    """
    row, tokens = dict(what), table["tokens"]

    def put(name: str, sums: np.ndarray, transform=np.asarray) -> None:
        if np.isnan(sums).any():
            row[name] = row[f"{name}_ci"] = None
            return
        row[name] = float(transform(sums.sum() / tokens.sum()))
        row[f"{name}_ci"] = bootstrap.ratio_interval(sums, tokens, transform)

    put("nll", table["nll"])
    put("perplexity", table["nll"], np.exp)
    put("excess_nll", table["nll"] - (np.nan if dense is None else dense["nll"]))
    put("perplexity_ratio", table["nll"] - (np.nan if same is None else same["nll"]), np.exp)
    put("kl_to_dense", table["kl"])
    put("top1_agreement", table["agreement"])
    return row | {"examples": len(tokens), "scored_tokens": int(tokens.sum())}
