"""What belongs to a model on disk, a checkpoint folder or one GGUF file: its config, its tokenizer, its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.weights.config_file import check_config, one_line, read_config_file
from transformers_patches.weights.file_kinds import is_gguf, is_pack, what_it_is
from transformers_patches.weights.gguf import GGUFCheckpoint
from transformers_patches.weights.gguf_config import gguf_config
from transformers_patches.weights.gguf_tokenizer import gguf_tokenizer
from transformers_patches.weights.pack import Pack
from transformers_patches.weights.safetensors_folder import Checkpoint
from transformers_patches.weights.source import WeightSource


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config of a checkpoint folder or GGUF file, without network; PartInferError if it is neither."""
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_config(folder)
    if not (folder / "config.json").is_file():
        raise PartInferError(f"no model at {folder} (config.json is missing): fetch one with python download.py")
    path = folder / "config.json"
    content = read_config_file(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # values of wrong types, or an architecture that transformers does not know either
        _refuse_own_code(folder, "config.json", error)
        raise PartInferError(f"{path} can't be used: {one_line(error)}; fetch the model again") from None
    config = _of_text(config, content, path)
    if config.dtype is None and not is_pack(folder):
        config.dtype = _stored_type(folder)
    family_of(config)  # an unknown architecture is the first thing to say
    return check_config(config, path)


def _of_text(config: PretrainedConfig, content: dict, path: Path) -> PretrainedConfig:
    """The config of the language model in one that also sees or hears. content: of config.json."""
    text = config.get_text_config()
    if text is config:
        return config
    if not isinstance(text, PretrainedConfig):
        raise PartInferError(
            f"{path}: a {config.model_type} model has no text_config: remove it, or fetch the model again"
        )
    if text.dtype is None:
        text.dtype = config.dtype
    own = content.get("text_config")
    if "tie_word_embeddings" in content and "tie_word_embeddings" not in (own if isinstance(own, dict) else {}):
        text.tie_word_embeddings = content["tie_word_embeddings"]
    return text


def _stored_type(folder: Path) -> torch.dtype | None:
    """The type of the weights, for a config that names none; None if there are no weights yet."""
    try:
        return Checkpoint(folder).first_float_type()
    except PartInferError:
        return None  # what loads the weights says why


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, without network; PartInferError if it has none that can be used, or another model's."""
    path = Path(path)
    if is_gguf(path):
        return gguf_tokenizer(path)
    described = read_config_file(path) if (path / "config.json").is_file() else {}  # which transformers reads as well
    for file in (path / "tokenizer.json", path / "tokenizer_config.json"):
        if (what := what_it_is(file)) is not None:
            raise PartInferError(f"{file} is {what}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        tokenizer.decode(tokenizer("a \u0fff\ue000").input_ids)  # the only way to notice some settings of wrong types
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers panics on some damaged files, and that is not an Exception
        _refuse_own_code(path, "tokenizer_config.json", error)
        raise PartInferError(f"{path} has no usable tokenizer: {one_line(error)}") from None
    _drop_copies(tokenizer)
    if described:
        most = described.get("vocab_size")
        size = tokenizer.vocab_size
        if not isinstance(size, int):
            raise PartInferError(f"{path} has no usable tokenizer: its vocab_size is no number")
        if most is not None and size > most:
            raise PartInferError(
                f"{path} has a tokenizer of {size} tokens, but its config.json says vocab_size {most}: the "
                "tokenizer is another model's"
            )
    return tokenizer


def _drop_copies(tokenizer: PreTrainedTokenizerBase) -> None:
    """Drop what a tokenizer was made from: the library behind it has its own. That is 60 MB for 150,000 tokens."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    for name in ("_vocab", "_merges"):
        held = vars(tokenizer).get(name)
        if isinstance(held, (dict, list)):
            setattr(tokenizer, name, type(held)())


def _refuse_own_code(folder: str | Path, file: str, error: BaseException) -> None:
    """Refuse a model that transformers has no class for: it would run the folder's code if that were trusted."""
    if "trust_remote_code" in str(error):
        raise PartInferError(
            f"{Path(folder) / file} asks for code that comes with the model (auto_map), which is never run: give a model "
            "that transformers has classes for"
        ) from None


def open_weights(path: str | Path) -> WeightSource:
    """The tensors of a checkpoint folder, pack or GGUF file; PartInferError if they are not there or damaged."""
    if is_gguf(path):
        return GGUFCheckpoint(path)
    return Pack(path) if is_pack(path) else Checkpoint(path)
