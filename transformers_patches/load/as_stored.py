"""What the stored tensors say about a model, where its config says something else."""

from __future__ import annotations

import copy
import re

from transformers import PretrainedConfig

from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.weights.source import WeightSource

HEAD = "lm_head.weight"
_OF_TEXT = "language_model."
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")


def names_in_model(weights: WeightSource, config: PretrainedConfig) -> dict[str, str]:
    """Parameter name in the model -> name in the file. Files of a bare decoder lack the leading `model.`.

    Tensors of one expert are parts of the tensor that has those of all experts. Of a model that also sees or hears, the names of its language model, which is what the config describes.
    Where embedding and head are tied and only the head is stored, the embedding is read from it, as transformers does.
    """
    family, stored = family_of(config), weights.names()
    if any(_OF_TEXT in name for name in stored):
        stored = {name for name in stored if _OF_TEXT in name or name == HEAD}
    names = {family.expert_part(family.name_in_model(_of_text_model(name))): name for name in stored}
    if config.tie_word_embeddings and HEAD in names:
        names.setdefault(_embedding(config), names[HEAD])
    return names


def as_stored(config: PretrainedConfig, weights: WeightSource) -> PretrainedConfig:
    """The config, but untied if it ties head and embedding and both are stored with different values.

    transformers loads such checkpoints (fine-tuned heads under the old config) in the same way. Raises PartInferError,
    before anything is built, if the config has more layers than are stored.
    """
    names = names_in_model(weights, config)
    numbers = (int(match[1]) for name in names if (match := _LAYER.search(name)))
    stored = max(numbers, default=-1) + 1
    if config.num_hidden_layers > stored:
        raise PartInferError(
            f"{weights.source} has {stored} layers, its config.json says num_hidden_layers {config.num_hidden_layers}: the "
            "checkpoint is incomplete, fetch it again"
        )
    head, embedding = names.get(HEAD), names.get(_embedding(config))
    tied = config.tie_word_embeddings and None not in (head, embedding)
    if not tied or head == embedding or weights.same(head, embedding):
        return config
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config


def _embedding(config: PretrainedConfig) -> str:
    return f"{family_of(config).embeddings}.weight"


def _of_text_model(name: str) -> str:
    """Without the part that tells a language model from the others beside it."""
    return name.replace(_OF_TEXT, "", 1)
