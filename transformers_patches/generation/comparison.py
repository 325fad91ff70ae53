"""The same prompts answered by the dense model and with the settings, one below the other, with the cost of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from transformers_patches import cli
from transformers_patches.generation.generate import GenerationOptions, GenerationResult, generate
from transformers_patches.load.loaded_model import LoadedModel

MEGABYTE = 10**6


@dataclass
class _Side:
    """One of the two models, and what it answered."""

    name: str  # its method
    loaded: LoadedModel
    results: list[GenerationResult]  # one for each prompt
    token_bytes: list[float]  # bytes of weights read per decoded token, for each prompt

    def row(self) -> dict:
        speeds = [r.decode_tokens_per_second for r in self.results if r.decode_tokens_per_second is not None]
        return {
            "method": self.name,
            "tokens_per_second": fmean(speeds) if speeds else None,
            "token_bytes": fmean(self.token_bytes) if self.token_bytes else None,
            "weight_bytes_resident": self.loaded.report.bytes_resident,
            "block_bytes": self.loaded.settings.block_bytes,
            "predicted_loss": self.loaded.run.predicted_loss,
        }


class Comparison:
    """Answers prompts with two models, the dense one and the one of the settings."""

    def __init__(self, dense: LoadedModel, other: LoadedModel, options: GenerationOptions) -> None:
        self.options = options
        self.sides = [_Side("dense", dense, [], []), _Side(other.settings.method, other, [], [])]

    def answer(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], show: Callable[[str], None] | None
    ) -> bool:
        """Answer one prompt with both models. Returns whether Ctrl-C ended an answer.

        show: called with the text as it comes; None: nothing is shown.
        """
        for side in self.sides:
            side.loaded.reset_counters()
            if show is not None:
                show(f"\n{side.name}: ")
            result = generate(side.loaded, tokenizer, prompt_ids, self.options, show)
            side.results.append(result)
            side.token_bytes.append(side.loaded.token_bytes())
            if show is not None:
                show(f"\n{' ' * len(side.name)}  [{_took(result, side)}]\n")
            if result.finish_reason == "interrupted":
                return True
        return False

    def rows(self) -> list[dict]:
        """A row for each model: means over the prompts."""
        return [side.row() for side in self.sides]


def _took(result: GenerationResult, side: _Side) -> str:
    speed = result.decode_tokens_per_second
    parts = [f"{result.generated_tokens} tokens"]
    parts += [f"{speed:.1f} tokens/s"] if speed is not None else []
    parts.append(f"{side.token_bytes[-1] / MEGABYTE:.1f} MB of weights per token")
    parts.append(f"{side.loaded.report.bytes_resident / MEGABYTE:.0f} MB in memory")
    return ", ".join(parts)


def table(rows: list[dict]) -> str:
    """The rows of a comparison as text."""
    lines = [("", "tokens/s", "MB of weights per token", "MB in memory", "predicted loss, nats per token")]
    for row in rows:
        loss = row["predicted_loss"]
        lines.append(
            (
                row["method"],
                "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}",
                "-" if row["token_bytes"] is None else f"{row['token_bytes'] / MEGABYTE:.1f}",
                f"{row['weight_bytes_resident'] / MEGABYTE:.0f}",
                "not measured" if loss is None else f"{loss:.3f}",
            )
        )
    return cli.aligned(lines)
