"""Short names of models, the hub ids that they stand for, and the folder name of each."""

from __future__ import annotations

import re
from pathlib import Path

from transformers_patches.errors import PartInferError

DEMO_MODEL = "smollm2-135m"
HUB_IDS = {
    "llama3-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "opt-125m": "facebook/opt-125m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    DEMO_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "qwen2.5-coder-1.5b": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "gemma3-270m": "google/gemma-3-270m",
}


def hub_id(name: str) -> str:
    """The hub id (owner/name) of a short name, or `name` if it is one; PartInferError for a name that is neither."""
    for short_name, known in HUB_IDS.items():
        if name.lower() in (short_name, known.lower()):
            return known
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise PartInferError(f"unknown model {name!r}: give a hub id (owner/name) or one of {', '.join(HUB_IDS)}")
    return name


def fetch_command(name: str) -> str:
    """The command that fetches a model, in the repository or where the package is installed."""
    in_repository = (Path(__file__).resolve().parents[1] / "download.py").is_file()
    return f"{'python download.py' if in_repository else 'partinfer-download'} --model_name {name}"


def folder_name(name: str) -> str:
    """The folder that download.py makes in models/: the last part of the hub id."""
    return hub_id(name).split("/")[-1]
