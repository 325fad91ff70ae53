"""Runs calibration texts through the dense model, and watches what enters its projections."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from evaluation.published.histogram import Histogram
from evaluation.published.settings import PublishedSettings
from evaluation.windows import Source, read_examples
from transformers_patches.errors import PartInferError
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.token_ids import check_token_ids
from transformers_patches.weights.model_files import load_tokenizer

WINDOW = 256  # tokens of a calibration text, less where the file is shorter


def calibration_ids(settings: PublishedSettings, folder: Path, loaded: LoadedModel, seed: int) -> torch.Tensor:
    """Token ids [texts, WINDOW] of the calibration texts: windows drawn with a seed, about as many tokens as asked for.

    Raises PartInferError if there are no texts, or too short ones.
    """
    length = min(WINDOW, settings.tokens, loaded.model.config.max_position_embeddings)
    if length < 2:
        raise PartInferError(f"calibration_tokens must be at least 2, got {settings.tokens}")
    source = Source(
        settings.calibration,
        split="validation",
        limit=max(1, settings.tokens // length),
        seed=seed,
        prefill_tokens=length - 1,
        scored_tokens=1,
    )
    examples = read_examples(source, load_tokenizer(folder), length)
    if any(len(example.context) + 1 != length for example in examples):
        raise PartInferError(
            f"{settings.calibration} has questions and answers: thresholds are taken from running text"
        )
    ids = [example.context + example.target for example in examples]
    check_token_ids([token for text in ids for token in text], loaded.model.config.vocab_size, settings.calibration)
    return torch.tensor(ids, device=loaded.device)


@contextmanager
def hooked(handles: list[RemovableHandle]):
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def watch(
    loaded: LoadedModel, ids: torch.Tensor, inputs: dict[str, nn.Module], outputs: dict[str, nn.Module]
) -> dict[str, Histogram]:
    """Sizes of what enters some modules of the dense model, and of what others give, over texts ids [texts, tokens]."""
    found = {name: Histogram() for name in (*inputs, *outputs)}

    def adding(name: str) -> Callable:
        return lambda _module, given, *output: found[name].add(output[0] if output else given[0])

    handles = [module.register_forward_pre_hook(adding(name)) for name, module in inputs.items()]
    handles += [module.register_forward_hook(adding(name)) for name, module in outputs.items()]
    with hooked(handles):
        for text in ids:
            loaded.model(input_ids=text[None], use_cache=False, logits_to_keep=1)
    loaded.check_weights()
    return found
