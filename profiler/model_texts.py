"""The texts that a command's arguments name, as token ids."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from accelerate import PartialState

from profiler.own_texts import OwnTexts
from profiler.placement import ProfiledModel
from profiler.sequences import Encoder
from profiler.texts import SELF, ResolvedSource
from transformers_patches.token_ids import check_token_ids


def text_sequences(arguments: argparse.Namespace, source: ResolvedSource, loaded: ProfiledModel) -> Iterator[list[int]]:
    """Token ids of the source's texts, from the first on; without end where the model writes its own.

    Raises PartInferError for a text with a token that the model does not have.
    """
    if source.dataset == SELF:
        return own_texts(arguments, source, loaded, PartialState()).sequences()
    encoder = Encoder(
        loaded.tokenizer,
        arguments.max_length,
        chat_template=arguments.chat_template,
        split=source.language_modelling,
    )
    return _known(encoder.sequences(source.prompts()), loaded.model.config.vocab_size)


def _known(sequences: Iterator[list[int]], vocab_size: int) -> Iterator[list[int]]:
    for number, ids in enumerate(sequences, start=1):
        check_token_ids(ids, vocab_size, f"text {number}")
        yield ids


def own_texts(
    arguments: argparse.Namespace, source: ResolvedSource, loaded: ProfiledModel, processes: PartialState
) -> OwnTexts:
    """What writes texts with the model, for --dataset self."""
    return OwnTexts(
        loaded.model,
        loaded.tokenizer,
        prefix=source.template.prefix(),
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        processes=processes,
    )
