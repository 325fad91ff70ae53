"""What belongs to a model on disk, a checkpoint folder or one GGUF file: its config, its tokenizer, its weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf import GGUFCheckpoint
from transformers_patches.weights.gguf_config import gguf_config
from transformers_patches.weights.gguf_file import is_gguf
from transformers_patches.weights.gguf_tokenizer import gguf_tokenizer
from transformers_patches.weights.pack import Pack
from transformers_patches.weights.pack_description import is_pack
from transformers_patches.weights.safetensors_folder import Checkpoint
from transformers_patches.weights.source import WeightSource


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config of a checkpoint folder or GGUF file, without network; PartInferError if it is neither."""
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_config(folder)
    if not (folder / "config.json").is_file():
        raise PartInferError(f"no model at {folder} (config.json is missing): fetch one with python download.py")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:  # damaged, or an architecture that transformers does not know either
        _refuse_own_code(folder, "config.json", error)
        reason = str(error).split(". ")[0].splitlines()[0]
        raise PartInferError(f"{folder / 'config.json'} can't be used: {reason}; fetch the model again") from None


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, without network; PartInferError if it has none that can be used."""
    try:
        if is_gguf(path):
            return gguf_tokenizer(Path(path))
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except PartInferError:
        raise
    except (OSError, ValueError) as error:
        _refuse_own_code(path, "tokenizer_config.json", error)
        raise PartInferError(f"{path} has no usable tokenizer: {str(error).splitlines()[0]}") from None


def _refuse_own_code(folder: str | Path, file: str, error: Exception) -> None:
    """Say it where transformers has no class of its own for a model and would run the folder's code if it were trusted."""
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
