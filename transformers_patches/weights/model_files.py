"""What belongs to a model on disk, a checkpoint folder or one GGUF file: its tokenizer, its weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from transformers_patches.errors import PartInferError
from transformers_patches.weights.gguf import GGUFCheckpoint
from transformers_patches.weights.gguf_file import is_gguf
from transformers_patches.weights.gguf_tokenizer import gguf_tokenizer
from transformers_patches.weights.pack import Pack
from transformers_patches.weights.pack_description import is_pack
from transformers_patches.weights.safetensors_folder import Checkpoint
from transformers_patches.weights.source import WeightSource


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, without network; PartInferError if it has none that can be used."""
    try:
        if is_gguf(path):
            return gguf_tokenizer(Path(path))
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except PartInferError:
        raise
    except (OSError, ValueError) as error:
        raise PartInferError(f"{path} has no usable tokenizer: {str(error).splitlines()[0]}") from None


def open_weights(path: str | Path) -> WeightSource:
    """The tensors of a checkpoint folder, pack or GGUF file; PartInferError if they are not there or damaged."""
    if is_gguf(path):
        return GGUFCheckpoint(path)
    return Pack(path) if is_pack(path) else Checkpoint(path)
