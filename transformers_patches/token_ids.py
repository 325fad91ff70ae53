"""Token ids that a model can take, and predictions that mean something."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from transformers_patches.errors import PartInferError

NOT_FINITE = (
    "the model's logits are not finite: weights or statistics hold NaN or infinity, or the numbers are too large for the "
    "type; try --dtype float32, or fetch the model again"
)


def check_token_ids(ids: Iterable[int], known: int, what: str = "the prompt") -> None:
    """Raise PartInferError for tokens that were added to the tokenizer, but not to the model.

    known: tokens that the model has embeddings for.
    what: what the ids are of, for the message.
    """
    wrong = next((i for i in ids if not 0 <= i < known), None)
    if wrong is not None:
        raise PartInferError(
            f"{what} has token {wrong}, but the model has embeddings for tokens 0 to {known - 1}: its tokenizer is another "
            "model's, or has tokens that the model was not trained with"
        )


def check_finite(logits: torch.Tensor) -> None:
    """Raise PartInferError for predictions that are NaN or Inf: whatever is computed from them is meaningless."""
    if not bool(torch.isfinite(logits).all()):
        raise PartInferError(NOT_FINITE)
